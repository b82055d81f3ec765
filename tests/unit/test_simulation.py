"""Whole runs on virtual time: promises are kept, seeds replay, planted bugs are found."""

import dataclasses
from unittest import mock

import pytest
from planted_bugs import PLANTED, PLANTED_IF, forget_what_was_settled
from simulated import assert_is_found, in_tiers, named

from asynception.config import RunConfig
from asynception.simulate.command import main
from asynception.simulate.parties import Computer
from asynception.simulate.run import SeedFailed, Simulation, simulate
from asynception.simulate.scenario import Fault, draw
from asynception.supervisor import Supervisor

NUM_SEEDS_FOR_A_BUG = 200


pytestmark = pytest.mark.usefixtures("one_thread")


@in_tiers(13, 40)
@pytest.mark.parametrize("mode", ["async", "bounded", "sync", "averaging", "elastic"])
def test_no_seed_breaks_a_promise(mode, seeds):
    reports = [simulate(seed, mode) for seed in seeds]
    assert all(report.mode == mode for report in reports)
    assert all(report.num_settled for report in reports)
    # The seeds are of use: something died, and runs began again, or went on.
    assert sum(report.num_worker_deaths for report in reports) > len(seeds) / 4
    assert sum(report.num_sessions - 1 for report in reports) > len(seeds) / 8
    assert sum(report.num_coordinator_deaths for report in reports) >= len(seeds) / 10


@in_tiers(6, 12)
@pytest.mark.parametrize("mode", ["async", "bounded", "sync", "averaging"])
def test_workers_whose_nodes_die_are_not_waited_for_and_come_back(mode, seeds):
    reports = [simulate(seed, mode, nodes=True) for seed in seeds]
    told = [line for report in reports for line in report.trace]
    assert sum("waits for room" in line for line in told) > len(seeds) / 2
    assert sum("is back" in line for line in told) > len(seeds) / 2


@in_tiers(6, 20)
@pytest.mark.parametrize("mode", ["async", "bounded", "sync", "averaging", "elastic"])
def test_no_seed_breaks_a_promise_while_workers_join_and_leave(mode, seeds):
    reports = [simulate(seed, mode, elastic=True) for seed in seeds]
    told = [line for report in reports for line in report.trace]
    reasons = ["it got SIGTERM"]
    if mode in ("async", "bounded", "elastic"):
        reasons += ["its node is being drained", "the run was scaled to"]
        assert sum("scaled from" in line for line in told) > len(seeds) / 2
    for why in reasons:
        assert any("left after" in line and why in line for line in told)
    assert sum(" began: " in line for line in told) > len(seeds) / 2


def test_it_is_found_if_all_wait_for_a_worker_without_room():
    assert simulate(67, "sync", nodes=True).num_settled
    bug = mock.patch.object(Supervisor, "_go_on_without")
    with bug, pytest.raises(SeedFailed, match=r"waited 1\d\d s for"):
        simulate(67, "sync", nodes=True)


def test_a_first_life_without_room_holds_up_nobody_whom_a_later_one_would_not():
    """In bounded mode shards wait for it from the start, and for later ones once they enter."""
    lost = Fault("node", 1.3, 150.0, 0.01)
    report = Simulation(dataclasses.replace(draw(0, "bounded"), faults=(lost,))).run()
    assert any("waits for room" in line for line in report.trace)


class OfTwo(Exception):
    """What it says is put together, so pickle can't make it anew."""

    def __init__(self, name, value):
        super().__init__(f"{name} = {value}")


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_worker_whose_error_can_not_be_pickled_is_replaced_all_the_same(mode):
    errors = iter([OfTwo("width", 3)])
    finish = Computer.finish

    def fail_once(self):
        for error in errors:
            raise error
        return finish(self)

    scenario = dataclasses.replace(draw(3, mode), faults=())
    with mock.patch.object(Computer, "finish", fail_once):
        report = Simulation(scenario).run()
    told = [line for line in report.trace if "died after 0 pushes" in line]
    assert any("width = 3)" in line for line in told)
    assert report.num_settled


def test_a_run_ends_when_no_worker_has_had_room_for_long():
    scenario = draw(3, "async")
    run = RunConfig(placement_timeout_s=60.0)
    lost = Fault("node", 3.0, 1e6, 1.0)
    config = scenario.config.model_copy(update={"run": run})
    scenario = dataclasses.replace(scenario, config=config, faults=(lost,))
    with pytest.raises(SeedFailed, match=r"run\.placement_timeout_s = 60: each needs 1 CPU"):
        Simulation(scenario).run()


@pytest.mark.parametrize("seed", [0, 7, 13])
@pytest.mark.parametrize("elastic", [False, True])
def test_a_seed_replays_to_the_last_step(seed, elastic):
    first, second = (simulate(seed, elastic=elastic) for _ in range(2))
    assert first.trace == second.trace
    assert first.digest == second.digest
    assert first.trace != simulate(seed + 1, elastic=elastic).trace


@pytest.mark.parametrize(
    ("plant", "first", "settings"),
    [
        *((plant, first, {}) for plant, first in PLANTED.items()),
        *(
            (plant, first, dict.fromkeys(names, True))
            for plant, (first, *names) in PLANTED_IF.items()
        ),
    ],
    ids=named,
)
def test_a_planted_bug_is_found(plant, first, settings):
    assert_is_found(plant, first, NUM_SEEDS_FOR_A_BUG, **settings)


def first_failure(plant):
    """The first seed that fails with a bug, and its trace."""
    for seed in range(NUM_SEEDS_FOR_A_BUG):
        try:
            with plant():
                simulate(seed)
        except SeedFailed as failure:
            return failure.seed, failure.trace
    return None


def test_a_failing_seed_fails_again_at_the_same_step():
    found = first_failure(forget_what_was_settled)
    assert found is not None
    assert found == first_failure(forget_what_was_settled)


def test_the_command_says_which_seed_failed(capsys):
    assert main(["--seed", "3", "--mode", "sync"]) == 0
    assert "seed 3: sync" in capsys.readouterr().out
    with forget_what_was_settled():
        seed, trace = first_failure(forget_what_was_settled)
        assert main(["--seed", str(seed)]) == 1
    assert capsys.readouterr().out.splitlines()[: len(trace)] == trace
