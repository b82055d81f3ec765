"""Small shards, pushes of ones, and states to compare."""

import pytest
import torch

from ps.consistency import Async
from ps.layout import Range, ShardRanges
from ps.push import Push
from ps.rules import SGD, Ema, Momentum, RMSprop
from ps.schedule import Constant, Horizon
from ps.shard import (
    Shard,
    ShardConfig,
    initial_state,
)

NUM_PARAMETERS, NUM_STATISTICS = 32, 16
RANGES = ShardRanges(Range(0, NUM_PARAMETERS), Range(0, NUM_STATISTICS), (Range(4, 20),))
HORIZON = Horizon(epoch_samples=100, num_workers=4)
RULES = [
    SGD(weight_decay=0.01),
    Momentum(weight_decay=0.01),
    RMSprop(weight_decay=0.01),
]
by_rule = pytest.mark.parametrize("optimizer", RULES, ids=lambda rule: rule.name)


def config(
    optimizer=SGD(),  # noqa: B008 (frozen)
    schedule=Constant(lr=1.0),  # noqa: B008
    ema=Ema(decay=0.9),  # noqa: B008
    max_staleness=None,
    ranges=RANGES,
):
    return ShardConfig(
        ranges, optimizer, schedule, HORIZON, ema, Async(max_staleness=max_staleness)
    )


def shard_at(start=0.0, **settings_):
    settled = config(**settings_)
    parameters = torch.full((NUM_PARAMETERS,), start)
    return Shard(settled, initial_state(settled.rule, parameters, torch.zeros(NUM_STATISTICS)))


def ones(sequence, worker=0, incarnation=0, pulled_version=0, num_samples=1, **vectors):
    """A push of ones, which with SGD and lr 1 takes 1 from every parameter."""
    gradient = vectors.get("gradient", torch.ones(NUM_PARAMETERS))
    delta = vectors.get("delta", torch.ones(NUM_STATISTICS))
    return Push(worker, incarnation, sequence, pulled_version, num_samples, gradient, delta)


def pulled(shard):
    """Copies of what a pull gives: parameters and statistics."""
    snapshot = shard.pin()
    copies = snapshot.parameters.clone(), snapshot.statistics.clone()
    shard.release(snapshot)
    return copies


def assert_same_state(state, other):
    assert state.clocks == other.clocks
    assert list(state.vectors) == list(other.vectors)
    for name, vector in state.vectors.items():
        assert torch.equal(vector, other.vectors[name]), name
    assert state.last_sequences == other.last_sequences
