"""A shard's state: captures that continue, first states, and one state over many shards."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import (
    NUM_PARAMETERS,
    NUM_STATISTICS,
    RANGES,
    assert_same_state,
    by_rule,
    config,
    ones,
    pulled,
    shard_at,
)

from model.flat import Segment
from ps.layout import plan_layout
from ps.push import Push
from ps.rules import Ema, Momentum, RMSprop
from ps.schedule import Clocks, Exponential
from ps.shard import (
    ForgottenReceipt,
    Outcome,
    Shard,
    ShardState,
    initial_state,
    vector_names,
    vector_range,
)


def random_pushes(num_pushes, numels=(NUM_PARAMETERS, NUM_STATISTICS), seed=0):
    """Pushes by 3 workers, some stale, some sent twice, one NaN; made anew at each call, since a
    shard uses gradients up."""
    generator = torch.Generator().manual_seed(seed)
    random = np.random.default_rng(seed)
    sequences = Counter()
    for index in range(num_pushes):
        gradient = torch.randn(numels[0], generator=generator)
        delta = torch.randn(numels[1], generator=generator)
        worker = int(random.integers(3))
        if random.random() > 0.2:
            sequences[worker] += 1
        if index == num_pushes // 3:
            gradient[0] = torch.nan
        age = int(random.integers(0, 8))
        samples = int(random.integers(1, 30))
        yield Push(worker, 0, sequences[worker], max(0, index - age), samples, gradient, delta)


def settle(shard, pushes):
    return [shard.push(push) for push in pushes]


def demanding(optimizer, ranges=RANGES):
    """A configuration in which everything depends on the clocks."""
    schedule = Exponential(lr=0.1, decay=0.7, every=40, warmup=20, unit="samples")
    ema = Ema(decay=0.99, warmup=True)
    return config(optimizer, schedule, ema, max_staleness=2, ranges=ranges)


def random_state(optimizer, numels=(NUM_PARAMETERS, NUM_STATISTICS)):
    generator = torch.Generator().manual_seed(11)
    parameters = torch.randn(numels[0], generator=generator)
    return initial_state(optimizer, parameters, torch.randn(numels[1], generator=generator))


@by_rule
@given(split=st.integers(0, 40))
@settings(deadline=None, max_examples=15)
def test_a_captured_state_continues_bit_for_bit(optimizer, split):
    settings_ = demanding(optimizer)
    straight = Shard(settings_, random_state(optimizer))
    expected = settle(straight, random_pushes(40))

    first = Shard(settings_, random_state(optimizer))
    settle(first, list(random_pushes(40))[:split])
    state = first.capture()
    settle(first, [ones(1000, worker=9)])  # a capture is a copy: what follows doesn't touch it
    second = Shard(settings_, state)
    rest = list(random_pushes(40))[split:]
    seen = dict(state.last_sequences)
    for push, receipt in zip(rest, expected[split:], strict=True):
        settled_before = push.sequence <= seen.get(push.worker, {}).get(0, -1)
        if settled_before:
            with pytest.raises(ForgottenReceipt):
                second.push(push)
        else:
            assert second.push(push) == receipt
    assert_same_state(second.capture(), straight.capture())


def test_a_fence_outlives_a_capture_even_before_the_new_life_pushes():
    """A zombie that was declared dead stays dead after a failover."""
    shard = shard_at()
    shard.push(ones(0, incarnation=0))
    shard.fence(worker=0, incarnation=1)
    successor = Shard(shard.config, shard.capture())
    assert successor.push(ones(1, incarnation=0)).outcome is Outcome.FENCED
    assert successor.push(ones(0, incarnation=1)).outcome is Outcome.APPLIED
    assert successor.fence(worker=0, incarnation=2) == {0: 0, 1: 0}


def test_a_new_shard_owns_copies():
    parameters, statistics = torch.zeros(NUM_PARAMETERS), torch.zeros(NUM_STATISTICS)
    settings_ = config(Momentum())
    state = initial_state(settings_.rule, parameters, statistics)
    shard = Shard(settings_, state)
    shard.push(ones(0))
    shard.push(ones(1))
    assert all((vector == 0).all() for vector in state.vectors.values())
    for vector in state.vectors.values():
        vector.fill_(99.0)
    assert (pulled(shard)[0] == -1.0 - 1.9).all()


@by_rule
def test_the_first_state_has_the_average_at_the_parameters_and_slots_at_their_start(optimizer):
    parameters, statistics = torch.randn(NUM_PARAMETERS), torch.randn(NUM_STATISTICS)
    vectors = initial_state(optimizer, parameters, statistics).vectors
    assert set(vectors) == set(vector_names(optimizer))
    assert torch.equal(vectors["ema"], parameters)
    assert torch.equal(vectors["ema_statistics"], statistics)
    starts = {"mean_square": 1.0, "momentum": 0.0}  # of TF1's optimizers
    for name in vectors:
        if name.startswith("slot."):
            assert (vectors[name] == starts[name.removeprefix("slot.")]).all()


def test_a_capture_holds_the_named_vectors_only():
    shard = shard_at(optimizer=RMSprop())
    state = shard.capture(["ema", "ema_statistics"])
    assert list(state.vectors) == ["ema", "ema_statistics"]
    everything = shard.capture().vectors
    assert tuple(everything) == vector_names(shard.config.rule)
    numels = {name: vector.numel() for name, vector in everything.items()}
    assert numels == shard.config.vector_numels()


@pytest.mark.parametrize("change", ["short", "missing", "unknown"])
def test_a_state_of_another_shape_is_a_bug(change):
    settings_ = config(Momentum())
    vectors = dict(random_state(settings_.rule).vectors)
    if change == "short":
        vectors["ema"] = vectors["ema"][:-1]
    elif change == "missing":
        del vectors["slot.momentum"]
    else:
        vectors["slot.mean_square"] = vectors["slot.momentum"]
    with pytest.raises((AssertionError, KeyError)):
        Shard(settings_, ShardState(Clocks(), vectors))


SEGMENTS = tuple(
    Segment(f"t{index}", (numel,), offset, decayed)
    for index, (numel, offset, decayed) in enumerate(
        [(30, 0, True), (7, 32, False), (100, 48, True), (16, 160, True), (41, 176, False)]
    )
)
STATISTICS = (Segment("mean", (20,), 0, False), Segment("variance", (20,), 32, False))
WHOLE = (224, 64)


def whole_after(optimizer, num_shards):
    """All vectors, joined, after random pushes to `num_shards` shards."""
    layout = plan_layout(SEGMENTS, STATISTICS, num_shards)
    start, parts, receipts = random_state(optimizer, WHOLE), [], []
    for ranges in layout.shards:
        vectors = {n: v[vector_range(ranges, n).slice()] for n, v in start.vectors.items()}
        shard = Shard(demanding(optimizer, ranges), ShardState(Clocks(), vectors))
        pushes = [
            Push(
                push.worker,
                push.incarnation,
                push.sequence,
                push.pulled_version,
                push.num_samples,
                # The NaN of one push must reach every shard for the shards to agree on it.
                push.gradient[ranges.parameters.slice()] * (push.gradient[0] * 0 + 1),
                push.statistics_delta[ranges.statistics.slice()],
            )
            for push in random_pushes(40, WHOLE)
        ]
        receipts.append(settle(shard, pushes))
        parts.append(shard.capture().vectors)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return whole, receipts


@by_rule
@pytest.mark.parametrize("num_shards", [2, 3, 5, 14])
def test_one_shard_and_many_give_the_same_bits(optimizer, num_shards):
    one, (receipts,) = whole_after(optimizer, 1)
    many, all_receipts = whole_after(optimizer, num_shards)
    assert all(each == receipts for each in all_receipts)
    assert {r.outcome for r in receipts} == {Outcome.APPLIED, Outcome.STALE, Outcome.NOT_FINITE}
    for name, vector in one.items():
        assert torch.equal(vector, many[name]), name
