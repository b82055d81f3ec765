"""Whole runs on virtual time that lose servers without replicas: all that this does is counted."""

import pytest
from planted_bugs import PLANTED_IN_LOSSES
from simulated import assert_is_found, in_tiers

from asynception.simulate.run import simulate

NUM_SEEDS_FOR_A_BUG = 100
MODES = ["async", "bounded", "sync", "averaging"]


pytestmark = pytest.mark.usefixtures("one_thread")


@in_tiers(10, 40)
@pytest.mark.parametrize("mode", [*MODES, "elastic"])
def test_no_seed_breaks_a_promise(mode, seeds):
    reports = [simulate(seed, mode, losses=True) for seed in seeds]
    assert sum(report.num_sessions - 1 for report in reports) > len(seeds) / 2
    num_salvages = sum(report.num_salvages for report in reports)
    assert num_salvages >= len(seeds) // 20 if mode in MODES else num_salvages == 0


@pytest.mark.parametrize("plant", PLANTED_IN_LOSSES, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant):
    assert_is_found(plant, PLANTED_IN_LOSSES[plant], NUM_SEEDS_FOR_A_BUG, losses=True)
