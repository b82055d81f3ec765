"""Totals against plain sums over the steps, and staleness against numpy's percentiles."""

import copy
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynception.totals import PHASES, Totals, bucket, histograms, staleness_summary
from ps.shard import Outcome, Receipt
from worker.step_report import GradientSummary, StepReport

seconds = st.integers(0, 1000).map(lambda n: n / 8)
receipts = st.builds(
    Receipt, st.sampled_from(Outcome), st.integers(0, 99), st.integers(0, 20), seconds
)
values = st.one_of(st.integers(-50, 50).map(float), st.sampled_from([math.nan, math.inf]))
steps = st.lists(
    st.builds(
        StepReport,
        st.integers(0, 9),
        st.integers(0, 8),
        st.lists(st.sampled_from("abcdef"), max_size=2),
        st.none() | st.builds(GradientSummary, values, values),
        st.lists(receipts, max_size=3),
        *[seconds] * len(PHASES),
        lanes=st.lists(st.sampled_from(["shm", "grpc"]), max_size=3),
    ),
    max_size=8,
)

WORKER = 3
KEPT = (Outcome.APPLIED, Outcome.ACCUMULATED)


def totals(of: list[StepReport]) -> Totals:
    result = Totals()
    for step in of:
        result.add(step, WORKER)
    return result


def check(result: Totals, of: list[StepReport]) -> None:
    """`result` is what plain sums over the steps are."""
    pushes = [step for step in of if step.gradient is not None]
    answers = [receipt for step in pushes for receipt in step.receipts]
    finite = [
        step.gradient
        for step in pushes
        if math.isfinite(step.gradient.loss) and math.isfinite(step.gradient.norm)
    ]
    assert (result.pushes, result.losses) == (len(pushes), len(finite))
    assert result.loss_sum == sum(each.loss for each in finite)
    assert result.norm_sum == sum(each.norm for each in finite)
    assert result.outcomes == Counter(receipt.outcome.value for receipt in answers)
    applied = [receipt.staleness for receipt in answers if receipt.outcome in KEPT]
    assert result.staleness == Counter(applied)
    buckets = Counter(bucket(value) for value in applied)
    assert histograms(result.worker_staleness) == ({WORKER: dict(buckets)} if applied else {})
    by_shard = histograms(result.shard_staleness)
    for shard in range(3):
        of_shard = [step.receipts[shard] for step in pushes if shard < len(step.receipts)]
        values = [bucket(r.staleness) for r in of_shard if r.outcome in KEPT]
        assert by_shard.get(shard, {}) == Counter(values)
    assert result.dropped == len(answers) - len(applied)
    for name in PHASES:
        assert result.phases_s[name] == sum(getattr(step, f"{name}_s") for step in of)
        assert result.worker_phases_s[WORKER, name] == result.phases_s[name]
    assert result.worker_pushes[WORKER] == len(pushes)
    assert result.worker_samples[WORKER] == sum(step.num_samples for step in pushes)
    reached_by = [each for step in pushes for each in enumerate(step.lanes)]
    assert result.shard_lanes == Counter(reached_by)


@settings(deadline=None)
@given(steps)
def test_totals_are_sums_over_steps(of):
    result = totals(of)
    check(result, of)
    assert result.corrupt == {key for step in of for key in step.corrupt_keys}
    rates = [r.lr for step in of if step.gradient is not None for r in step.receipts]
    assert result.lr == (rates[-1] if rates else 0.0)


@settings(deadline=None)
@given(steps, steps)
def test_since_is_what_came_after(before, after):
    result = totals(before)
    earlier = copy.deepcopy(result)
    for step in after:
        result.add(step, WORKER)
    since = result.since(earlier)
    check(since, after)
    assert earlier == totals(before), "the earlier totals are left alone"
    known = {key for step in before for key in step.corrupt_keys}
    assert since.corrupt == {key for step in after for key in step.corrupt_keys} - known
    assert since.lr == result.lr
    assert result.since(Totals()) == result


@settings(deadline=None)
@given(steps)
def test_json_gives_the_totals_back(of):
    result = totals(of)
    text = json.dumps(result.to_json(), allow_nan=False)
    again = Totals.from_json(json.loads(text))
    assert again == result
    assert (again.dropped, again.corrupt) == (result.dropped, result.corrupt)
    for each in of:  # of the same kinds, and independent
        again.add(each, WORKER)
    check(again, of * 2)
    assert result == totals(of)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_counted_and_spoils_no_mean(loss):
    good = StepReport(0, 1, (), GradientSummary(3.0, 5.0), ())
    bad = StepReport(1, 1, (), GradientSummary(loss, 7.0), ())
    worse = StepReport(2, 1, (), GradientSummary(4.0, loss), ())
    result = totals([bad, worse])
    assert math.isnan(result.mean_loss)
    assert math.isnan(result.mean_norm)
    result.add(good, WORKER)
    assert (result.pushes, result.mean_loss, result.mean_norm) == (3, 3.0, 5.0)


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 300), st.integers(1, 60), min_size=1))
def test_staleness_is_summed_up_as_numpy_does(histogram):
    values = np.repeat(list(histogram), list(histogram.values()))
    summary = staleness_summary(histogram)
    assert summary["mean"] == pytest.approx(values.mean())
    for name, percent in (("p50", 50), ("p99", 99), ("max", 100)):
        assert summary[name] == np.percentile(values, percent, method="inverted_cdf")
    shuffled = dict(reversed(histogram.items()))
    assert staleness_summary(shuffled) == pytest.approx(summary)


@pytest.mark.parametrize("count", [99, 100, 101, 200, 100_000, 10**9])
def test_the_99th_percentile_is_exact_at_its_edges(count):
    beyond = count - -(-99 * count // 100)
    assert staleness_summary({1: count - beyond, 5: beyond})["p99"] == 1
    assert staleness_summary({1: count - beyond - 1, 5: beyond + 1})["p99"] == 5


def test_no_staleness_at_all():
    assert staleness_summary({}) == {"mean": 0, "p50": 0, "p99": 0, "max": 0}
    assert staleness_summary(Counter({3: 0})) == {"mean": 0, "p50": 0, "p99": 0, "max": 0}


@given(st.integers(0, 5000))
def test_buckets_are_exact_at_first_and_then_powers_of_two(value):
    least = bucket(value)
    assert least == value if value < 16 else least <= value < 2 * least
    assert bucket(least) == least
    assert least < 16 or least & (least - 1) == 0
