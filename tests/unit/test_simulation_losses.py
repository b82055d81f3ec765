"""Whole runs on virtual time that lose servers without replicas: all that this does is counted."""

import re

import pytest
import torch
from planted_bugs import PLANTED_IN_LOSSES

from asynception.simulate.run import SeedFailed, simulate

NUM_SEEDS, NUM_SEEDS_FOR_A_BUG = 40, 100
MODES = ["async", "bounded", "sync", "averaging"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Workers of a run set this for their process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [*MODES, "elastic"])
def test_no_seed_breaks_a_promise(mode):
    reports = [simulate(seed, mode, losses=True) for seed in range(NUM_SEEDS)]
    assert sum(report.num_sessions - 1 for report in reports) > 5
    assert any(report.num_salvages for report in reports) == (mode in MODES)


def test_people_are_told_of_what_is_done_again():
    told = [line for seed in (3, 52, 160) for line in simulate(seed, losses=True).trace]
    assert any(re.search(r"starting again .*; \d+ samples are trained on twice", t) for t in told)


@pytest.mark.parametrize("plant", PLANTED_IN_LOSSES, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant):
    first = PLANTED_IN_LOSSES[plant]
    for seed in range(first, first + NUM_SEEDS_FOR_A_BUG):
        try:
            with plant():
                simulate(seed, losses=True)
        except SeedFailed as failure:
            print(f"{plant.__name__}: seed {seed}: {failure}")
            simulate(seed, losses=True)  # without the bug it keeps its promises
            return
    pytest.fail(f"{NUM_SEEDS_FOR_A_BUG} seeds miss it")
