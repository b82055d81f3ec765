"""The learning rate: both papers' schedules by hand, units, warmup, ends, and refused settings."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from ps.schedule import Clocks, Constant, Cosine, Exponential, Horizon, Schedule

IMAGENET = Horizon(epoch_samples=1_281_167, num_workers=60)
JFT = Horizon(epoch_samples=350_000_000, num_workers=60)
UNITS = ("updates", "samples", "worker_samples", "epochs")

ANY_SCHEDULE = TypeAdapter(Schedule)


def rate_at_epoch(schedule, epoch):
    return schedule.rate(Clocks(samples=round(epoch * IMAGENET.epoch_samples)), IMAGENET)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 0.045),
        (1.999, 0.045),
        (2, 0.0423),  # 0.045 * 0.94
        (3.999, 0.0423),
        (4, 0.039762),  # 0.0423 * 0.94
        (6, 0.03737628),  # 0.039762 * 0.94
        (100, 0.045 * 0.0453307),  # 0.94**50 = exp(50 ln 0.94) = exp(-3.0937702) = 0.0453307
    ],
)
def test_imagenet_schedule_of_the_paper(epoch, expected):
    """0.045, times 0.94 every 2 epochs (Chollet, section 4.3)."""
    schedule = Exponential(lr=0.045, decay=0.94, every=2, unit="epochs")
    assert rate_at_epoch(schedule, epoch) == pytest.approx(expected, rel=1e-6)


def test_decay_falls_with_the_first_sample_of_the_third_epoch():
    schedule = Exponential(lr=0.045)
    two_epochs = 2 * IMAGENET.epoch_samples
    assert schedule.rate(Clocks(samples=two_epochs - 1), IMAGENET) == 0.045
    assert schedule.rate(Clocks(samples=two_epochs), IMAGENET) == pytest.approx(0.0423)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (0, 1e-3),
        (2_999_999, 1e-3),
        (3_000_000, 9e-4),
        (5_999_999, 9e-4),
        (6_000_000, 8.1e-4),
        (9_000_000, 7.29e-4),
    ],
)
def test_jft_schedule_of_the_paper(samples, expected):
    """0.001, times 0.9 every 3,000,000 samples (Chollet, section 4.3)."""
    schedule = Exponential(lr=0.001, decay=0.9, every=3_000_000, unit="samples")
    assert schedule.rate(Clocks(samples=samples), JFT) == pytest.approx(expected, rel=1e-12)


def test_jft_schedule_in_samples_of_the_run_has_vanished_after_one_pass():
    """The trap: 350 M / 3 M = 116 whole steps; 0.001 * 0.9**116 = 4.9e-9."""
    schedule = Exponential(lr=0.001, decay=0.9, every=3_000_000, unit="samples")
    assert f"{schedule.rate(Clocks(samples=350_000_000), JFT):.1e}" == "4.9e-09"


def test_jft_schedule_in_samples_of_a_worker_is_at_its_second_step_after_one_pass():
    """350 M samples over 60 workers are 5.83 M each: one whole step of 3 M."""
    schedule = Exponential(lr=0.001, decay=0.9, every=3_000_000, unit="worker_samples")
    assert schedule.rate(Clocks(samples=350_000_000), JFT) == pytest.approx(9e-4, rel=1e-12)


@pytest.mark.parametrize(
    ("unit", "expected"), [("updates", 7), ("samples", 600), ("worker_samples", 150), ("epochs", 3)]
)
def test_units(unit, expected):
    horizon = Horizon(epoch_samples=200, num_workers=4)
    assert horizon.position(Clocks(updates=7, samples=600), unit) == expected


@given(st.integers(0, 10**6), st.integers(0, 10**9), st.integers(1, 10**7), st.integers(1, 1000))
@settings(deadline=None)
def test_units_agree_with_each_other(updates, samples, epoch_samples, num_workers):
    horizon = Horizon(epoch_samples=epoch_samples, num_workers=num_workers)
    clocks = Clocks(updates, samples)
    assert horizon.position(clocks, "updates") == updates
    assert horizon.position(clocks, "samples") == samples
    assert horizon.position(clocks, "worker_samples") * num_workers == pytest.approx(samples)
    assert horizon.position(clocks, "epochs") * epoch_samples == pytest.approx(samples)


@pytest.mark.parametrize("unit", UNITS)
def test_a_schedule_reads_the_clock_of_its_unit(unit):
    """Of two horizons and clocks that differ everywhere, the rate is a half at the 10th unit."""
    horizon = Horizon(epoch_samples=100, num_workers=5)
    ten_units = {
        "updates": Clocks(updates=10, samples=3),
        "samples": Clocks(updates=3, samples=10),
        "worker_samples": Clocks(updates=3, samples=50),
        "epochs": Clocks(updates=3, samples=1000),
    }[unit]
    schedule = Exponential(lr=1.0, decay=0.5, every=10, unit=unit)
    assert schedule.rate(ten_units, horizon) == 0.5
    assert schedule.rate(Clocks(), horizon) == 1.0


def rates(schedule, positions):
    """The rate at each number of updates, for a schedule in updates."""
    return [schedule.rate(Clocks(updates=updates), JFT) for updates in positions]


def test_warmup_rises_in_a_line_and_then_is_over():
    schedule = Constant(lr=0.8, warmup=4, unit="updates")
    assert rates(schedule, range(7)) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_warmup_multiplies_the_decay_which_counts_from_the_start():
    """Step 0: 1; step 1 (from update 2): 1/2; step 2 (from update 4): 1/4; rising over 4."""
    schedule = Exponential(lr=1.0, decay=0.5, every=2, warmup=4, unit="updates")
    assert rates(schedule, range(6)) == pytest.approx([0, 1 / 4, 2 / 8, 3 / 8, 1 / 4, 1 / 4])


def test_smooth_decay_between_the_steps():
    schedule = Exponential(lr=1.0, decay=0.25, every=2, staircase=False, unit="updates")
    assert rates(schedule, range(4)) == pytest.approx([1, 0.5, 0.25, 0.125])


@given(st.floats(0.01, 1), st.integers(1, 50), st.integers(0, 500))
@settings(deadline=None)
def test_staircase_is_the_smooth_decay_at_the_last_step(decay, every, updates):
    stairs = Exponential(lr=1.0, decay=decay, every=every, unit="updates")
    smooth = Exponential(lr=1.0, decay=decay, every=every, unit="updates", staircase=False)
    last_step = updates - updates % every
    assert rates(stairs, [updates]) == pytest.approx(rates(smooth, [last_step]), rel=1e-9)


def test_cosine_by_hand():
    """lr 2 falling to 0.2 in 8: at an eighth turn cos(pi/4) = 0.70710678, at half 0, at the end -1.

    0.1 + 0.9 * (1 + c) / 2 gives 0.86819805, 0.55 and 0.1 of lr 2.
    """
    schedule = Cosine(lr=2.0, length=8, final=0.1, unit="updates")
    expected = [2.0, 1.7363961, 1.1, 0.2]
    assert rates(schedule, [0, 2, 4, 8]) == pytest.approx(expected, rel=1e-7)


def test_cosine_stays_at_its_end():
    schedule = Cosine(lr=2.0, length=8, final=0.1, unit="updates")
    assert rates(schedule, [8, 9, 12, 16, 10**9]) == pytest.approx([0.2] * 5)


def test_cosine_ends_at_zero_by_default():
    assert rates(Cosine(lr=1.0, length=10, unit="updates"), [10, 11]) == pytest.approx([0, 0])


def test_constant_is_constant():
    assert rates(Constant(lr=0.3, unit="updates"), [0, 1, 10**9]) == [0.3, 0.3, 0.3]


all_schedules = st.one_of(
    st.builds(Constant, lr=st.just(0.5), unit=st.just("updates")),
    st.builds(
        Exponential,
        lr=st.just(0.5),
        decay=st.floats(0.01, 1),
        every=st.floats(0.1, 1e6),
        staircase=st.booleans(),
        unit=st.just("updates"),
    ),
    st.builds(
        Cosine,
        lr=st.just(0.5),
        length=st.floats(0.1, 1e6),
        final=st.floats(0, 1),
        unit=st.just("updates"),
    ),
)


@given(all_schedules, st.lists(st.integers(0, 10**9), min_size=2, max_size=10).map(sorted))
@settings(deadline=None)
def test_without_warmup_the_rate_starts_at_lr_never_rises_and_never_falls_below_zero(
    schedule, positions
):
    found = rates(schedule, [0, *positions])
    assert found[0] == pytest.approx(0.5)
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(found))
    assert all(math.isfinite(rate) and rate >= 0 for rate in found)


@pytest.mark.parametrize(
    ("setting", "settings_"),
    [
        ("lr", {"kind": "constant"}),
        ("lr", {"kind": "constant", "lr": 0}),
        ("lr", {"kind": "constant", "lr": -0.1}),
        ("lr", {"kind": "constant", "lr": math.nan}),
        ("warmup", {"kind": "constant", "lr": 1, "warmup": -1}),
        ("unit", {"kind": "constant", "lr": 1, "unit": "steps"}),
        ("decay", {"kind": "exponential", "lr": 1, "decay": 0}),
        ("decay", {"kind": "exponential", "lr": 1, "decay": 1.1}),
        ("every", {"kind": "exponential", "lr": 1, "every": 0}),
        ("length", {"kind": "cosine", "lr": 1}),
        ("length", {"kind": "cosine", "lr": 1, "length": 0}),
        ("final", {"kind": "cosine", "lr": 1, "length": 1, "final": 1.1}),
        ("final", {"kind": "cosine", "lr": 1, "length": 1, "final": -0.1}),
        ("length", {"kind": "constant", "lr": 1, "length": 5}),  # of another kind
        ("kind", {"kind": "linear", "lr": 1}),
    ],
)
def test_refused_settings(setting, settings_):
    with pytest.raises(ValidationError) as refused:
        ANY_SCHEDULE.validate_python(settings_)
    (error,) = refused.value.errors()
    assert setting in (error["loc"] or (error["ctx"]["discriminator"].strip("'"),))


@pytest.mark.parametrize("field", ["epoch_samples", "num_workers"])
def test_a_horizon_needs_samples_and_workers(field):
    with pytest.raises(ValidationError, match=field):
        Horizon(**{"epoch_samples": 1, "num_workers": 1, field: 0})


def test_schedules_are_chosen_by_kind_and_frozen():
    schedule = ANY_SCHEDULE.validate_python({"kind": "cosine", "lr": 1, "length": 5})
    assert isinstance(schedule, Cosine)
    with pytest.raises(ValidationError, match="frozen"):
        schedule.lr = 2
