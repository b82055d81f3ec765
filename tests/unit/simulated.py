"""What tests of whole runs on virtual time have in common."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import pytest

from asynception.simulate.run import SeedFailed, simulate


def in_tiers(num_first: int, num_seeds: int) -> pytest.MarkDecorator:
    """Give a test its `seeds`: so many from 0 on each time, and the others only in long runs."""
    others = pytest.param(range(num_first, num_seeds), marks=pytest.mark.long)
    return pytest.mark.parametrize("seeds", [range(num_first), others], ids=["first", "others"])


def named(given: object) -> str:
    """The id of a planted bug in a test's name."""
    return getattr(given, "__name__", "")


def assert_is_found(
    plant: Callable[[], AbstractContextManager[None]], first: int, num_seeds: int, **settings
) -> None:
    """One of so many seeds, from `first` on, fails by a planted bug, and not without it.

    `first` is the one that finds it (docs/simulation.md), which saves time.
    """
    with impatient():
        for seed in range(first, first + num_seeds):
            try:
                with plant():
                    simulate(seed, **settings)
            except SeedFailed as failure:
                print(f"{plant.__name__}: seed {seed}: {failure}")
                simulate(seed, **settings)  # without the bug it keeps its promises
                return
    pytest.fail(f"{num_seeds} seeds miss it")


def impatient() -> AbstractContextManager[object]:
    """Runs that get stuck are given up sooner, which saves seconds."""
    return mock.patch("asynception.simulate.run.LIMIT_S", 500.0)
