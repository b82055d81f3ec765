"""Rare things that befall whole runs on virtual time, in seeds in which they are seen to do so.

What a seed is may change with the code. So each test looks in the trace for what it is about: if
that isn't there any more, look for another seed.
"""

import dataclasses
import re

import pytest
from planted_bugs import keep_silent_of_places_left_empty
from simulated import impatient

from asynception.simulate.network import Weather
from asynception.simulate.run import SeedFailed, Simulation, simulate
from asynception.simulate.scenario import draw

pytestmark = pytest.mark.usefixtures("one_thread")


def has(lines, pattern):
    """Whether one of the trace's lines has it."""
    return any(re.search(pattern, line) for line in lines)


def after_the_last(lines, pattern):
    """What follows the last line that has it."""
    return lines[1 + max(n for n, line in enumerate(lines) if re.search(pattern, line)) :]


@pytest.mark.parametrize("seed", [36, 312])
def test_a_death_after_the_last_checkpoint_ends_no_run(seed):
    """The session that begins from that checkpoint has nothing to train on."""
    num_samples = draw(seed).total_samples
    all_done = re.escape(f"Position(frontier={num_samples}, open=())")
    assert has(simulate(seed).trace, f"session [1-9] from {all_done}")


@pytest.mark.parametrize("seed", [77, 340])
def test_an_evaluator_that_dies_in_the_last_evaluation_ends_no_run(seed):
    report = simulate(seed)
    assert report.num_sessions == 1
    at_the_end = after_the_last(report.trace, " end ")
    assert has(after_the_last(at_the_end, "evaluation was given up"), "Cut from evaluator-[1-9]")


@pytest.mark.parametrize(
    ("seed", "mode"), [(3, "async"), (22, "bounded"), (40, "sync"), (31, "averaging")]
)
def test_live_shards_lose_nothing_when_another_is_lost(seed, mode):
    report = simulate(seed)
    assert (report.mode, report.num_salvages > 0) == (mode, True)
    assert has(report.trace, "the others none")


def test_people_are_told_of_what_is_done_again():
    assert has(simulate(3).trace, r"starting again .*; \d+ samples are trained on twice")


def test_a_worker_may_die_while_a_checkpoint_is_written():
    """What it left at one shard alone is in the totals then, and not in the checkpoint's."""
    told = "\n".join(simulate(28, harsh=True).trace)
    written = re.findall(r"checkpoint's cut is told(.*?)checkpoint at", told, re.DOTALL)
    left = [re.findall(r"end \S+ Settled\(everywhere=(\S+), somewhere=(\S+)\)", w) for w in written]
    assert any(everywhere != somewhere for each in left for everywhere, somewhere in each)


def of_two_leases(seed, mode):
    """Four workers start over a slow network, while the first ones lease all that there is."""
    scenario = draw(seed, mode)
    config, num_samples = scenario.config, 24
    strict = {"slack": 1} if mode == "bounded" else {"backup_workers": 0}
    config = config.model_copy(
        update={
            "scaling": config.scaling.model_copy(update={"num_workers": 4}),
            "data": config.data.model_copy(update={"batch_size": 2, "lease_batches": 6}),
            "training": config.training.model_copy(update={"samples": num_samples}),
            "consistency": config.consistency.model_copy(update=strict),
        }
    )
    return dataclasses.replace(
        scenario,
        config=config,
        total_samples=num_samples,
        corrupt=frozenset(),
        faults=(),
        weather=Weather(latency_s=0.2, heals_s=60.0),
    )


@pytest.mark.parametrize("mode", ["sync", "bounded"])
def test_a_place_for_which_no_work_is_left_holds_nobody_up(mode):
    report = Simulation(of_two_leases(3, mode)).run()
    assert not has(report.trace, "worker-[23] is ")
    bug = keep_silent_of_places_left_empty()
    with bug, impatient(), pytest.raises(SeedFailed, match="not at an end"):
        Simulation(of_two_leases(3, mode)).run()


def of_many_checkpoints(seed):
    """Among calls that come late and twice, and no other faults."""
    scenario = draw(seed, "async")
    checkpoint = scenario.config.checkpoint.model_copy(update={"every_s": 0.5})
    config = scenario.config.model_copy(update={"checkpoint": checkpoint})
    weather = Weather(latency_s=0.01, repeated=0.2, late=0.1, late_s=8.0, heals_s=60.0)
    return dataclasses.replace(scenario, config=config, faults=(), weather=weather)


@pytest.mark.parametrize(
    ("seed", "what"), [(18, "checkpoint"), (12, "checkpoint"), (14, "evaluation")]
)
def test_a_copy_that_a_late_call_took_away_ends_no_run(seed, what):
    """Cut or Release, carried out late or a second time; at 12, of the last checkpoint."""
    trace = Simulation(of_many_checkpoints(seed), harsh=True).run().trace
    assert has(trace, "/(Cut|Release) from .*, (late|again)")
    assert has(trace, rf"{what}( was)? given up: (no cut named|.*Refused)")
    assert has(trace, r"no cut named .*; starting again from") == (seed == 12)
