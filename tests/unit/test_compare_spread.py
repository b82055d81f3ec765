"""Curves, their means, and what a difference between groups allows to say."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynception.compare.curves import Curve, first_reach, mean_curve
from asynception.compare.spread import RARE, Spread, chance_of_apart, compare

VALUES = st.lists(st.floats(-100, 100), min_size=1, max_size=5)


def points():
    return st.dictionaries(st.integers(0, 50), st.floats(0, 1), min_size=1, max_size=8).map(
        lambda found: Curve(
            np.array(sorted(found), float), np.array([found[x] for x in sorted(found)])
        )
    )


@given(points(), st.integers(1, 4))
def test_the_mean_of_one_curve_many_times_is_that_curve(curve, count):
    mean = mean_curve([curve] * count)
    np.testing.assert_allclose(mean.x, curve.x)
    np.testing.assert_allclose(mean.y, curve.y)


@given(st.lists(points(), min_size=1, max_size=4))
def test_a_mean_lies_among_its_curves_wherever_all_have_begun(curves):
    mean = mean_curve(curves)
    assert mean.x[0] == max(curve.x[0] for curve in curves)
    assert mean.x[-1] == max(curve.x[-1] for curve in curves)
    values = np.array([np.interp(mean.x, curve.x, curve.y) for curve in curves])
    assert (values.min(0) - 1e-12 <= mean.y).all()
    assert (mean.y <= values.max(0) + 1e-12).all()
    assert mean.y[-1] == pytest.approx(np.mean([curve.y[-1] for curve in curves]))


def test_there_is_no_mean_without_points():
    empty = Curve(np.array([]), np.array([]))
    assert mean_curve([]) is None
    assert mean_curve([empty]) is None


@given(points(), st.floats(0, 1))
def test_a_level_is_reached_first_where_the_curve_first_is_there(curve, level):
    reach = first_reach(curve, level)
    assert (reach is None) == bool((curve.y < level).all())
    if reach is None:
        return
    before = curve.x < reach.x - 1e-9
    assert (curve.y[before] < level).all()
    assert reach.at_most == bool(curve.y[0] >= level)
    assert np.interp(reach.x, curve.x, curve.y) == pytest.approx(
        curve.y[0] if reach.at_most else level, abs=1e-9
    )


@given(VALUES)
def test_a_spread_is_mean_and_range(values):
    spread = Spread.of(values)
    assert (spread.low, spread.high, spread.num_runs) == (min(values), max(values), len(values))
    assert spread.mean == pytest.approx(np.mean(values))


def test_unknown_values_are_left_out():
    assert Spread.of([None, math.nan, 2.0, math.inf]) == Spread(2.0, 2.0, 2.0, 1)
    assert Spread.of([None]) is None


@pytest.mark.parametrize(("n", "m"), list(itertools.product(range(1, 5), repeat=2)))
def test_the_chance_of_ranges_apart_is_that_of_all_ways_to_deal(n, m):
    ways = list(itertools.combinations(range(n + m), n))
    apart = 0
    for mine in ways:
        others = [value for value in range(n + m) if value not in mine]
        apart += max(mine) < min(others) or max(others) < min(mine)
    ones, twos = Spread.of(map(float, range(n))), Spread.of(map(float, range(m)))
    assert chance_of_apart(ones, twos) == pytest.approx(apart / len(ways))


@given(VALUES, VALUES)
def test_groups_are_apart_only_if_no_range_reaches_into_the_other(ours, others):
    one, other = Spread.of(ours), Spread.of(others)
    verdict = compare(one, other)
    assert verdict == compare(other, one)
    overlap = not (max(ours) < min(others) or max(others) < min(ours))
    if min(len(ours), len(others)) == 1:
        assert verdict == "alone"
    elif overlap:
        assert verdict == "within"
    else:
        assert verdict == ("apart" if chance_of_apart(one, other) <= RARE else "few")


def test_three_runs_each_are_what_it_takes_to_be_apart():
    low, high = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    assert compare(Spread.of(low), Spread.of(high)) == "apart"
    assert compare(Spread.of(low[:2]), Spread.of(high)) == "few"
