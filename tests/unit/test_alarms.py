"""What is said of a run that may end badly, how often, and what stops one."""

import math
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynception.alarms import WINDOW_PUSHES_PER_WORKER, Alarms, Watch
from asynception.failures import Diverged
from asynception.recipe import validate
from asynception.totals import Totals

NUM_WORKERS = 2
WINDOW = NUM_WORKERS * WINDOW_PUSHES_PER_WORKER
CONFIG = validate(
    {
        "data": {"train": "/a", "val": "/b"},
        "training": {"epochs": 1, "max_not_finite": 2},
        "scaling": {"num_workers": NUM_WORKERS, "num_servers": 2},
    }
)


class Run:
    """Totals that grow by a window at a time."""

    def __init__(self, config=CONFIG):
        self.totals = Totals()
        self.watch = Watch(config, Totals(), good_checkpoint="checkpoint-7")

    def window(self, loss=1.0, staleness=1, pushes=WINDOW):
        finite = math.isfinite(loss)
        self.totals.pushes += pushes
        self.totals.losses += pushes * finite
        self.totals.loss_sum += pushes * loss if finite else 0
        self.totals.staleness[staleness] += pushes
        return list(self.watch.warnings(self.totals))


def test_a_mean_above_the_number_of_workers_is_told_once():
    run = Run()
    assert run.window(staleness=NUM_WORKERS) == []
    assert run.window(staleness=9, pushes=WINDOW - 1) == [], "not before a window is full"
    (said,) = run.window(staleness=9)
    assert "by 9.0 versions" in said
    assert "2 workers" in said
    assert run.window(staleness=9) == []


def test_a_loss_that_rises_is_told_with_the_last_good_checkpoint_and_again_after_it_fell():
    run = Run()
    assert [run.window(loss=loss) for loss in (7.0, 2.0, 1.0, 1.9)] == [[]] * 4
    assert not run.watch.diverging
    (said,) = run.window(loss=5.0)
    assert "5 over the last 50 pushes, 1 at its lowest" in said
    assert "checkpoint-7" in said
    assert run.watch.diverging
    assert run.window(loss=6.0) == []
    assert run.window(loss=1.5) == []
    assert not run.watch.diverging
    assert len(run.window(loss=50.0)) == 1


@given(st.lists(st.floats(1.0, 1.9), max_size=20))
def test_noise_is_not_told_of(losses):
    run = Run()
    assert all(run.window(loss=loss) == [] for loss in losses)


def test_a_window_without_a_finite_loss_says_nothing_of_it():
    run = Run()
    run.window(loss=1.0)
    assert run.window(loss=math.nan) == []
    assert not run.watch.diverging


@pytest.mark.parametrize(
    ("checkpoint", "said"), [("checkpoint-7", "is checkpoint-7"), (None, "can't be told")]
)
def test_too_many_gradients_that_are_not_finite_stop_the_run(checkpoint, said):
    alarms = Alarms(CONFIG, Totals(outcomes=Counter(not_finite=6)))
    alarms.check(Totals(outcomes=Counter(not_finite=6 + 2 * 2)), checkpoint)
    with pytest.raises(Diverged, match=f"3 gradients.*max_not_finite = 2.*{re.escape(said)}"):
        alarms.check(Totals(outcomes=Counter(not_finite=6 + 2 * 3)), checkpoint)


def stopping(**settings):
    training = CONFIG.training.model_copy(update={"on_divergence": "stop", **settings})
    return CONFIG.model_copy(update={"training": training})


def test_a_rising_loss_stops_the_session_if_it_is_to():
    run = Run(stopping())
    assert [run.window(loss=loss) for loss in (7.0, 2.0)] == [[], []]
    with pytest.raises(Diverged, match="50 over the last 50 pushes") as caught:
        run.window(loss=50.0)
    assert caught.value.checkpoint == "checkpoint-7"


def test_a_checkpoint_is_good_once_the_window_that_it_was_written_in_has_ended_well():
    run = Run(stopping())
    run.window(loss=1.0)
    run.watch.saved("checkpoint-8")
    assert run.watch.good_checkpoint == "checkpoint-7"
    assert run.watch.spared() == {"checkpoint-7", "checkpoint-8"}
    run.window(loss=1.1)
    assert run.watch.good_checkpoint == "checkpoint-8"
    run.watch.saved("checkpoint-9")
    with pytest.raises(Diverged, match="the last good checkpoint is checkpoint-8"):
        run.window(loss=9.0)
    assert run.watch.good_checkpoint == "checkpoint-8"


def test_a_session_that_begins_with_a_high_loss_is_held_to_what_was_before():
    before = Totals(pushes=100, losses=100, loss_sum=200.0)
    watch, totals = Watch(stopping(), before), before.copy()
    totals.pushes += WINDOW
    totals.losses += WINDOW
    totals.loss_sum += 5.0 * WINDOW
    with pytest.raises(Diverged, match="5 over the last 50 pushes, 2 at its lowest"):
        list(watch.warnings(totals))
