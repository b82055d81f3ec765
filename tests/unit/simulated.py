"""What tests of whole runs on virtual time have in common."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from asynception.simulate.run import SeedFailed, simulate


def assert_is_found(
    plant: Callable[[], AbstractContextManager[None]], first: int, num_seeds: int, **settings
) -> None:
    """One of so many seeds, from `first` on, fails by a planted bug, and not without it.

    `first` is the one that finds it as of now (docs/simulation.md), which saves time.
    """
    for seed in range(first, first + num_seeds):
        try:
            with plant():
                simulate(seed, **settings)
        except SeedFailed as failure:
            print(f"{plant.__name__}: seed {seed}: {failure}")
            simulate(seed, **settings)  # without the bug it keeps its promises
            return
    pytest.fail(f"{num_seeds} seeds miss it")
