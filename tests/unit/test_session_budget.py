"""When a run has had its time."""

from hypothesis import given
from hypothesis import strategies as st

from asynception.budget import Budget
from asynception.origin import Origin
from asynception.totals import Progress, Totals


class Clock:
    def __init__(self):
        self.now_s = 50.0

    def __call__(self):
        return self.now_s


def progress(leases):
    return Progress(0, Totals(leases=leases))


@given(st.integers(0, 100), st.integers(1, 100), st.integers(0, 9))
def test_time_counts_from_the_first_lease_and_on_from_earlier_sessions(before_s, max_s, leases):
    clock = Clock()
    budget = Budget(max_s, Origin(None, totals=Totals(leases=leases), wall_s=before_s), clock)
    clock.now_s += 1000
    assert not budget.is_spent(progress(leases)), "starting is free"
    assert budget.is_spent(progress(leases + 1)) == (before_s >= max_s)
    clock.now_s += max(0, max_s - before_s)
    assert budget.is_spent(progress(leases + 2))


def test_without_a_limit_time_is_never_over():
    clock = Clock()
    budget = Budget(None, Origin(None), clock)
    assert not budget.is_spent(progress(1))
    clock.now_s += 1e9
    assert not budget.is_spent(progress(2))
