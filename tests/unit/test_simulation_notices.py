"""Whole runs on virtual time whose servers have to leave their nodes: nothing is lost."""

import dataclasses
import functools
import itertools

import pytest
from planted_move_bugs import PLANTED
from simulated import assert_is_found, in_tiers

from asynception.simulate.network import Weather
from asynception.simulate.run import Simulation, simulate
from asynception.simulate.scenario import Fault, draw

NUM_SEEDS_FOR_A_BUG = 300
LONG_S = 20.0
MODES = ["async", "bounded", "sync", "averaging"]


pytestmark = pytest.mark.usefixtures("one_thread")


@in_tiers(5, 12)
@pytest.mark.parametrize("replicas", [0, 1])
@pytest.mark.parametrize("mode", [*MODES, "elastic"])
def test_no_seed_breaks_a_promise(mode, replicas, seeds):
    reports = [simulate(seed, mode, replicas=replicas, notices=True) for seed in seeds]
    assert sum(report.num_moves for report in reports) > len(seeds) / 4
    told = [line for report in reports for line in report.trace]
    assert sum(" is gone" in line for line in told) > len(seeds) / 4


def quiet(seed, mode, replicas, num_hosts, *faults):
    """A run that nothing befalls but this, over a network without faults."""
    scenario = draw(seed, mode, replicas=replicas)
    weather = Weather(latency_s=0.01, heals_s=60.0)
    return dataclasses.replace(scenario, faults=faults, weather=weather, num_hosts=num_hosts)


@functools.cache
def long_runs(which, mode, replicas, num_servers):
    """Seeds whose run takes long enough for a server to move: these of them, from the first on."""
    runs = (of_size(quiet(seed, mode, replicas, 3), num_servers) for seed in itertools.count())
    long = (run.seed for run in runs if Simulation(run).run().virtual_s > LONG_S)
    return list(itertools.islice(long, which.start, which.stop))


def of_size(scenario, num_servers):
    scaling = scenario.config.scaling.model_copy(update={"num_servers": num_servers})
    config = scenario.config.model_copy(update={"scaling": scaling})
    return dataclasses.replace(scenario, config=config)


def told(report, text):
    return [line for line in report.trace if text in line]


@in_tiers(1, 4)
@pytest.mark.parametrize("replicas", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_a_server_leaves_in_time_and_nobody_starts_again(mode, replicas, seeds):
    for seed in long_runs(seeds, mode, replicas, 2):
        leaving = Fault("notice", 2.0, 20.0, 0.0)  # of server 0's, and of no standby
        report = Simulation(of_size(quiet(seed, mode, replicas, 3, leaving), 2)).run()
        assert (report.num_sessions, report.num_worker_deaths) == (1, 0)
        assert report.num_moves == len(told(report, "server 0 moved to another node")) == 1
        assert report.num_promotions == 0
        if report.virtual_s > LONG_S:
            assert len(told(report, "server 0 has a standby again")) == replicas


@in_tiers(1, 4)
@pytest.mark.parametrize("mode", MODES)
def test_a_standby_leaves_in_time_and_its_server_stays(mode, seeds):
    for seed in long_runs(seeds, mode, 1, 1):
        leaving = Fault("notice", 2.0, 9.0, 0.5)  # of the second of three hosts
        report = Simulation(of_size(quiet(seed, mode, 1, 3, leaving), 1)).run()
        assert (report.num_sessions, report.num_moves, report.num_promotions) == (1, 0, 0)
        assert len(told(report, "the standby of server 0 moved to another node")) == 1
        assert not told(report, "the standby of server 0 died")


@in_tiers(1, 4)
@pytest.mark.parametrize("replicas", [0, 1])
def test_with_no_other_node_it_stays_until_there_is_one(replicas, seeds):
    leaving, another = Fault("notice", 1.0, 1e6, 0.0), Fault("host", 2.0, 0.0, 0.0)
    for seed in long_runs(seeds, "async", replicas, 2):
        alone = Simulation(of_size(quiet(seed, "async", replicas, 1, leaving), 2)).run()
        assert (alone.num_sessions, alone.num_moves) == (1, 0)
        assert len(told(alone, "on a node that is being drained: no other node")) == 2
        report = Simulation(of_size(quiet(seed, "async", replicas, 1, leaving, another), 2)).run()
        assert report.num_sessions == 1
        assert report.num_moves == 2 or report.virtual_s < LONG_S


def test_without_a_notice_in_time_a_server_is_lost_as_by_a_death():
    late = Fault("notice", 3.0, 0.01, 0.0)
    report = Simulation(quiet(3, "async", 0, 2, late)).run()
    assert (report.num_sessions, report.num_moves) == (2, 0)


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_seed_replays_to_the_last_step(replicas):
    first, second = (simulate(5, replicas=replicas, notices=True) for _ in range(2))
    assert first.trace == second.trace
    assert first.trace != simulate(5, replicas=replicas).trace


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant):
    replicas, first = PLANTED[plant]
    assert_is_found(plant, first, NUM_SEEDS_FOR_A_BUG, replicas=replicas, notices=True)
