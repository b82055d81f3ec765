"""The shard: at most once, fences, dropped work, and formulas."""

from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from small_shards import (
    NUM_PARAMETERS,
    NUM_STATISTICS,
    assert_same_state,
    by_rule,
    config,
    ones,
    pulled,
    shard_at,
)

from ps import receipts as receipts_module
from ps import shard as shard_module
from ps.layout import Range, ShardRanges
from ps.rules import Ema
from ps.schedule import Clocks, Constant, Exponential
from ps.shard import (
    ForgottenReceipt,
    Outcome,
    Receipt,
    Shard,
    initial_state,
    vector_names,
)

WORKERS, KEPT = 3, 3
BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


class AnyArrival(RuleBasedStateMachine):
    """Pushes, retries, zombies, fences and failovers in any order, against a model of receipts.

    The model keeps every receipt ever given, by (worker, incarnation, sequence), and what a
    settled push may still be answered with. START and the counts are small integers, so float32
    is exact. A captured state starts a new shard now and then, which must go on as the old one
    would have, but for the receipts, which it has forgotten.
    """

    START = 1000.0

    def __init__(self):
        super().__init__()
        self.patch = patch.object(receipts_module, "RECEIPTS_KEPT", KEPT)
        self.patch.start()

    def teardown(self):
        self.patch.stop()

    @initialize(max_staleness=st.sampled_from([None, 0, 2, 5]))
    def begin(self, max_staleness):
        self.max_staleness = max_staleness
        self.shard = shard_at(self.START, max_staleness=max_staleness)
        self.life = dict.fromkeys(range(WORKERS), 0)
        self.settled: dict[tuple[int, int], dict[int, Receipt]] = {}
        self.answerable: dict[int, list[int]] = {worker: [] for worker in range(WORKERS)}
        self.samples = 0
        self.delta_sum = 0
        self.counted: Counter[Outcome] = Counter()

    @property
    def version(self):
        outcomes = [r.outcome for life in self.settled.values() for r in life.values()]
        return outcomes.count(Outcome.APPLIED)

    def enter(self, worker, incarnation):
        if incarnation > self.life[worker]:
            self.life[worker] = incarnation
            self.answerable[worker] = []

    def judge(self, flaw, staleness):
        if flaw is not None:
            return Outcome.NOT_FINITE
        if self.max_staleness is not None and staleness > self.max_staleness:
            return Outcome.STALE
        return Outcome.APPLIED

    @rule(
        worker=st.integers(0, WORKERS - 1),
        newer_life=st.sampled_from([0, 0, 0, 0, 1, 2]),
        older_life=st.sampled_from([0, 0, 0, 1]),
        ahead=st.sampled_from([1, 1, 1, 1, 2, 0, -1, -2, -3, -4]),
        age=st.integers(0, 8),
        num_samples=st.integers(1, 9),
        delta=st.integers(-3, 3),
        flaw=st.sampled_from([None, None, None, None, *BAD]),
        in_delta=st.booleans(),
        where=st.integers(0, NUM_STATISTICS - 1),
    )
    def push(
        self,
        worker,
        newer_life,
        older_life,
        ahead,
        age,
        num_samples,
        delta,
        flaw,
        in_delta,
        where,
    ):
        incarnation = max(0, self.life[worker] + newer_life - older_life)
        settled = self.settled.get((worker, incarnation), {})
        sequence = max(0, max(settled, default=-1) + ahead)
        version = self.version
        push = ones(
            sequence,
            worker,
            incarnation,
            pulled_version=max(0, version - age),
            num_samples=num_samples,
            delta=torch.full((NUM_STATISTICS,), float(delta)),
        )
        if flaw:
            (push.statistics_delta if in_delta else push.gradient)[where] = BAD[flaw]
        staleness = version - push.pulled_version

        if incarnation < self.life[worker]:
            self.counted[Outcome.FENCED] += 1
            assert self.shard.push(push) == Receipt(Outcome.FENCED, version, staleness, 1.0)
            return
        self.enter(worker, incarnation)
        if sequence <= max(settled, default=-1):
            if sequence in self.answerable[worker]:
                assert self.shard.push(push) == settled[sequence]
            else:
                with pytest.raises(ForgottenReceipt, match=f"push {sequence} of worker {worker}"):
                    self.shard.push(push)
            return
        outcome = self.judge(flaw, staleness)
        receipt = self.shard.push(push)
        assert receipt == Receipt(outcome, version, staleness, 1.0)
        self.settled.setdefault((worker, incarnation), {})[sequence] = receipt
        self.answerable[worker] = [*self.answerable[worker], sequence][-KEPT:]
        self.counted[outcome] += 1
        if outcome is Outcome.APPLIED:
            self.samples += num_samples
            self.delta_sum += delta

    @rule(worker=st.integers(0, WORKERS - 1), ahead=st.sampled_from([-1, 0, 1, 1, 2]))
    def fence(self, worker, ahead):
        incarnation = max(0, self.life[worker] + ahead)
        self.enter(worker, incarnation)
        assert self.shard.fence(worker, incarnation) == self.newest_of(worker)

    @rule()
    def fail_over(self):
        self.shard = Shard(self.shard.config, self.shard.capture())
        self.answerable = {worker: [] for worker in range(WORKERS)}
        self.counted.clear()

    def newest_of(self, worker):
        return {life: max(of) for (w, life), of in self.settled.items() if w == worker}

    @invariant()
    def every_push_counts_once(self):
        parameters, statistics = pulled(self.shard)
        assert (parameters == self.START - self.version).all()
        assert (statistics == self.delta_sum).all()
        assert self.shard.clocks == Clocks(self.version, self.samples)
        assert self.shard.version == self.version

    @invariant()
    def nothing_is_settled_silently(self):
        assert +self.shard.settled == +self.counted
        newest = {worker: self.newest_of(worker) for worker in range(WORKERS)}
        found = self.shard.last_sequences()
        assert {worker: found.get(worker, {}) for worker in range(WORKERS)} == newest


AnyArrival.TestCase.settings = settings(deadline=None, max_examples=120, stateful_step_count=40)
TestAnyArrival = AnyArrival.TestCase


def test_a_retry_gets_the_first_receipt_and_changes_nothing():
    shard = shard_at()
    first = shard.push(ones(0))
    shard.push(ones(0, worker=1))
    before = shard.capture()
    again = shard.push(ones(0, pulled_version=1, gradient=torch.full((NUM_PARAMETERS,), 9.0)))
    assert again == first == Receipt(Outcome.APPLIED, 0, 0, 1.0)
    assert_same_state(shard.capture(), before)
    assert shard.settled == {Outcome.APPLIED: 2}


def test_a_dropped_push_stays_dropped_when_it_is_sent_again():
    shard = shard_at(max_staleness=0)
    shard.push(ones(0, worker=1))
    dropped = shard.push(ones(0))
    assert dropped.outcome is Outcome.STALE
    assert shard.push(ones(0, pulled_version=1)) == dropped
    assert shard.version == 1


def test_the_newest_receipts_are_kept_and_older_pushes_never_apply_again():
    shard = shard_at()
    receipts = [shard.push(ones(n)) for n in range(shard_module.RECEIPTS_KEPT + 1)]
    for sequence, receipt in list(enumerate(receipts))[1:]:
        assert shard.push(ones(sequence)) == receipt
    before = shard.capture()
    with pytest.raises(ForgottenReceipt, match="push 0 of worker 0, incarnation 0"):
        shard.push(ones(0))
    assert_same_state(shard.capture(), before)
    assert shard.settled == {Outcome.APPLIED: len(receipts)}


def test_a_new_life_is_not_answered_with_receipts_of_an_earlier_one():
    shard = shard_at()
    for sequence in range(3):
        shard.push(ones(sequence, incarnation=0))
    assert shard.push(ones(2, incarnation=1)).version == 3
    with pytest.raises(ForgottenReceipt, match="push 1 of worker 0, incarnation 1"):
        shard.push(ones(1, incarnation=1))


def test_after_a_fence_earlier_lives_change_nothing():
    shard = shard_at()
    shard.push(ones(0, incarnation=0))
    shard.push(ones(0, incarnation=1))
    assert shard.fence(worker=0, incarnation=2) == {0: 0, 1: 0}
    before = shard.capture()
    for incarnation in (0, 1):
        assert shard.push(ones(1, incarnation=incarnation)).outcome is Outcome.FENCED
    assert_same_state(shard.capture(), before)
    assert shard.fence(worker=0, incarnation=2) == {0: 0, 1: 0}
    assert shard.push(ones(0, incarnation=2)).outcome is Outcome.APPLIED
    assert shard.push(ones(0, worker=1)).outcome is Outcome.APPLIED
    assert shard.fence(worker=0, incarnation=3) == {0: 0, 1: 0, 2: 0}


@by_rule
def test_dropped_pushes_leave_every_vector_alone(optimizer):
    """Also the slots and averages, and with NaN the momentum, which would never recover."""
    shard = shard_at(2.0, optimizer=optimizer, max_staleness=3)
    for sequence in range(5):
        shard.push(ones(sequence, pulled_version=sequence))
    shard.fence(worker=1, incarnation=1)
    before = shard.capture(vector_names(optimizer))
    nan = torch.full((NUM_PARAMETERS,), torch.nan)
    assert shard.push(ones(0, worker=2, pulled_version=1)).outcome is Outcome.STALE
    nan_push = ones(0, worker=3, pulled_version=5, gradient=nan)
    assert shard.push(nan_push).outcome is Outcome.NOT_FINITE
    assert shard.push(ones(0, worker=1)).outcome is Outcome.FENCED
    after = shard.capture(vector_names(optimizer))
    assert after.clocks == before.clocks
    for name, vector in before.vectors.items():
        assert torch.equal(vector, after.vectors[name]), name
    assert shard.settled == {
        Outcome.APPLIED: 5,
        Outcome.STALE: 1,
        Outcome.NOT_FINITE: 1,
        Outcome.FENCED: 1,
    }


@pytest.mark.parametrize("bound", [0, 1, 4])
def test_max_staleness_is_the_largest_that_is_applied(bound):
    shard = shard_at(max_staleness=bound)
    for sequence in range(6):
        shard.push(ones(sequence, pulled_version=sequence))
    late = shard.push(ones(0, worker=1, pulled_version=6 - bound - 1))
    assert (late.outcome, late.staleness) == (Outcome.STALE, bound + 1)
    assert shard.version == 6
    in_time = shard.push(ones(1, worker=1, pulled_version=6 - bound))
    assert (in_time.outcome, in_time.staleness) == (Outcome.APPLIED, bound)
    assert shard.version == 7


def test_without_a_bound_any_staleness_is_applied():
    shard = shard_at()
    for sequence in range(100):
        receipt = shard.push(ones(sequence, pulled_version=0))
        assert (receipt.outcome, receipt.staleness) == (Outcome.APPLIED, sequence)


@given(
    st.integers(1, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
    st.sampled_from(sorted(BAD)),
)
@settings(deadline=None)
def test_one_bad_element_anywhere_is_found(size_and_place, flaw):
    numel, place = size_and_place
    vector = torch.full((numel,), torch.finfo(torch.float32).max)
    assert shard_module._is_finite(vector)
    vector[place] = BAD[flaw]
    assert not shard_module._is_finite(vector)


def test_a_model_without_statistics_has_nothing_to_check_or_add():
    ranges = ShardRanges(Range(0, NUM_PARAMETERS), Range(0, 0), ())
    bare = config(ranges=ranges)
    state = initial_state(bare.rule, torch.zeros(NUM_PARAMETERS), torch.zeros(0))
    shard = Shard(bare, state)
    assert shard.push(ones(0, delta=torch.zeros(0))).outcome is Outcome.APPLIED
    assert pulled(shard)[1].numel() == 0


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_and_statistics_follow_the_formulas(warmup):
    """Algorithm 2: theta -= lr g; ema = a ema + (1 - a) theta; statistics add deltas, undecayed.

    In float64 against a scalar recursion in plain Python, with dropped pushes in between. With
    warmup, a = min(decay, (1 + n) / (10 + n)) at the update that follows n others.
    """
    random = np.random.default_rng(1)
    settings_ = config(ema=Ema(decay=0.8, warmup=warmup), schedule=Constant(lr=0.1))
    start, start_statistics = 3.0, 5.0
    shard = Shard(
        settings_,
        initial_state(
            settings_.rule,
            torch.full((NUM_PARAMETERS,), start, dtype=torch.float64),
            torch.full((NUM_STATISTICS,), start_statistics, dtype=torch.float64),
        ),
    )
    theta = ema = start
    statistics = ema_statistics = start_statistics
    for n in range(60):
        g, d = random.normal(size=2)
        gradient = torch.full((NUM_PARAMETERS,), g, dtype=torch.float64)
        delta = torch.full((NUM_STATISTICS,), d, dtype=torch.float64)
        shard.push(ones(2 * n, gradient=gradient, delta=delta))
        bad = torch.full((NUM_PARAMETERS,), torch.nan, dtype=torch.float64)
        shard.push(ones(2 * n + 1, gradient=bad, delta=delta))
        a = min(0.8, (1 + n) / (10 + n)) if warmup else 0.8
        theta -= 0.1 * g
        ema = a * ema + (1 - a) * theta
        statistics += d
        ema_statistics = a * ema_statistics + (1 - a) * statistics
    expected = {
        "parameters": theta,
        "statistics": statistics,
        "ema": ema,
        "ema_statistics": ema_statistics,
    }
    vectors = shard.capture().vectors
    assert set(vectors) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(vectors[name].numpy(), value, rtol=1e-12, err_msg=name)


def test_the_learning_rate_comes_from_the_clocks_before_the_push():
    """Halved every 10 samples: pushes of 4 samples meet 0, 4, 8, 12, 16, 20 samples."""
    schedule = Exponential(lr=1.0, decay=0.5, every=10, unit="samples")
    shard = shard_at(schedule=schedule)
    rates = [shard.push(ones(n, num_samples=4)).lr for n in range(6)]
    assert rates == [1, 1, 1, 0.5, 0.5, 0.25]
    assert (pulled(shard)[0] == -sum(rates)).all()


def test_dropped_pushes_do_not_move_the_clocks():
    shard = shard_at(schedule=Exponential(lr=1.0, decay=0.5, every=10, unit="samples"))
    nan = torch.full((NUM_PARAMETERS,), torch.nan)
    for sequence in range(5):
        shard.push(ones(sequence, num_samples=100, gradient=nan.clone()))
    assert shard.clocks == Clocks(0, 0)
    assert shard.push(ones(5)).lr == 1.0


def test_what_a_pull_holds_stays_as_it_was():
    shard = shard_at(7.0)
    snapshot = shard.pin()
    for sequence in range(10):
        shard.push(ones(sequence))
    assert snapshot.version == 0
    assert (snapshot.parameters == 7.0).all()
    assert (snapshot.statistics == 0.0).all()
    shard.release(snapshot)
    assert shard.num_buffers == 3
