"""When evaluations and checkpoints are due."""

from types import SimpleNamespace

import pytest

from asynception.due import Due

EPOCH, TOTAL = 100, 300


def due(**checkpoint: float | None) -> tuple[Due, SimpleNamespace]:
    """Of a run of three epochs with an evaluation after each; and its clock, as `now_s`."""
    time = SimpleNamespace(now_s=0.0)
    config = SimpleNamespace(
        checkpoint=SimpleNamespace(**{"every_epochs": None, "every_s": None} | checkpoint),
        evaluation=SimpleNamespace(every_epochs=1.0),
    )
    plan = SimpleNamespace(
        config=config,
        total_samples=TOTAL,
        samples_of=lambda epochs: int(epochs * EPOCH),
    )
    return Due(plan, 0, lambda: time.now_s), time


def test_each_multiple_is_due_once_however_late_it_is_seen():
    it, _ = due(every_epochs=0.5)
    seen = [10, 49, 50, 60, 99, 130, 199, 210]
    assert [n for n in seen if it.checkpoint(n)] == [50, 130, 199, 210]
    assert [n for n in seen if it.evaluation(n)] == [130, 210]


def test_seconds_count_from_the_last_one_for_whatever_reason_it_was_made():
    it, time = due(every_epochs=1, every_s=10)
    time.now_s = 9
    assert it.checkpoint(100)
    time.now_s = 18
    assert not it.checkpoint(101)
    time.now_s = 19
    assert it.checkpoint(102)


@pytest.mark.parametrize("every", [{"every_epochs": 1}, {"every_s": 10}])
def test_nothing_is_due_once_all_samples_are_in(every):
    """The end is evaluated and saved in any case, and once."""
    it, time = due(**every)
    time.now_s = 100
    assert it.checkpoint(TOTAL - 1)
    time.now_s = 200
    assert not it.checkpoint(TOTAL)
    assert not it.evaluation(TOTAL)
