"""Whole runs with standbys on virtual time: a failure costs nothing, planted bugs are found."""

import dataclasses
from unittest import mock

import pytest
from planted_replica_bugs import PLANTED
from simulated import assert_is_found, in_tiers

from asynception.simulate.network import Weather
from asynception.simulate.run import Simulation, simulate
from asynception.simulate.scenario import Fault, draw

NUM_SEEDS_FOR_A_BUG = 300


pytestmark = pytest.mark.usefixtures("one_thread")


@in_tiers(9, 20)
@pytest.mark.parametrize("mode", ["async", "bounded", "sync", "averaging", "elastic"])
def test_no_seed_breaks_a_promise(mode, seeds):
    reports = [simulate(seed, mode, replicas=1) for seed in seeds]
    assert sum(report.num_promotions for report in reports) > len(seeds) / 4
    assert sum(report.num_worker_deaths for report in reports) > len(seeds) / 4


def one_failure(seed, mode, kind):
    """A run that nothing befalls but this, once it trains."""
    scenario = draw(seed, mode, replicas=1)
    fault = Fault(kind, 4.0 + seed / 7, 15.0, (seed % 5) / 5)
    weather = Weather(latency_s=0.01, heals_s=60.0)
    return dataclasses.replace(scenario, faults=(fault,), weather=weather)


@in_tiers(4, 10)
@pytest.mark.parametrize("kind", ["server", "zombie server", "cut server", "frozen server"])
@pytest.mark.parametrize("mode", ["async", "bounded", "sync", "averaging"])
def test_one_failure_of_a_server_or_a_standby_starts_no_run_again(mode, kind, seeds):
    reports = [Simulation(one_failure(seed, mode, kind)).run() for seed in seeds]
    assert all(report.num_sessions == 1 for report in reports)
    assert sum(report.num_promotions for report in reports) >= len(seeds) / 4
    told = [line for report in reports for line in report.trace]
    assert any("another one is made" in line for line in told)


@pytest.mark.parametrize("kind", ["cut server", "frozen server"])
@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_no_worker_is_given_up_for_the_silence_of_a_server(mode, kind):
    reports = []
    for seed in range(5):
        scenario = one_failure(seed, mode, kind)
        timeout_s = scenario.config.failure.server_timeout_s
        failure = scenario.config.failure.model_copy(update={"worker_timeout_s": timeout_s})
        config = scenario.config.model_copy(update={"failure": failure})
        with mock.patch("asynception.simulate.run.BEAT_S", 1.0):
            reports.append(Simulation(dataclasses.replace(scenario, config=config)).run())
    assert sum(report.num_worker_deaths for report in reports) == 0
    assert sum(report.num_promotions for report in reports) > 1


@pytest.mark.parametrize("seed", [3, 7])
def test_a_server_that_dies_during_the_last_checkpoint_or_evaluation_starts_no_run_again(seed):
    quiet = dataclasses.replace(one_failure(seed, "async", "server"), faults=())
    trained_s = max(
        float(line.split()[0]) for line in Simulation(quiet).run().trace if " end " in line
    )
    for late_s in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8):
        fault = Fault("server", trained_s + late_s, 0.0, 0.0)
        report = Simulation(dataclasses.replace(quiet, faults=(fault,))).run()
        assert (report.num_sessions, report.num_promotions) == (1, 1), late_s


def test_a_seed_replays_to_the_last_step():
    first, second = simulate(2, replicas=1), simulate(2, replicas=1)
    assert first.trace == second.trace
    assert first.trace != simulate(2).trace


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant):
    assert_is_found(plant, PLANTED[plant], NUM_SEEDS_FOR_A_BUG, replicas=1)
