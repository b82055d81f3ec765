"""Shards under a policy, in float64, and the pushes to feed them."""

import torch

from ps.layout import Range, ShardRanges
from ps.push import Push
from ps.rules import SGD, Ema
from ps.schedule import Constant, Horizon
from ps.shard import Shard, ShardConfig, initial_state

NUM_PARAMETERS, NUM_STATISTICS = 24, 4
RANGES = ShardRanges(Range(0, NUM_PARAMETERS), Range(0, NUM_STATISTICS), (Range(4, 20),))


def shard_of(
    policy,
    num_workers,
    rule=SGD(),  # noqa: B008 (frozen)
    schedule=Constant(lr=1.0),  # noqa: B008
    start=None,
    dtype=torch.float64,
):
    """A shard at a fixed start, or at `start` throughout."""
    horizon = Horizon(epoch_samples=100, num_workers=num_workers)
    config = ShardConfig(RANGES, rule, schedule, horizon, Ema(decay=0.9), policy)
    parameters = torch.linspace(-1, 1, NUM_PARAMETERS, dtype=dtype)
    if start is not None:
        parameters.fill_(start)
    statistics = torch.zeros(NUM_STATISTICS, dtype=dtype)
    return Shard(config, initial_state(rule, parameters, statistics))


def push_of(worker, sequence, version, gradient=None, num_samples=4, incarnation=0, delta=None):
    """A push of ones unless given; vectors are copied, as a shard uses them up."""
    gradient = torch.ones(NUM_PARAMETERS, dtype=torch.float64) if gradient is None else gradient
    delta = torch.ones(NUM_STATISTICS, dtype=gradient.dtype) if delta is None else delta
    vectors = (gradient.clone(), delta.clone())
    return Push(worker, incarnation, sequence, version, num_samples, *vectors)


def parameters_of(shard):
    """A copy of the newest parameters."""
    return shard.capture(["parameters"]).vectors["parameters"]


class Task:
    """A smooth, nonlinear loss with batches: gradients depend on where they are taken."""

    def __init__(self, seed, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        self.generator, self.dtype = generator, dtype
        self.inputs = torch.randn(64, NUM_PARAMETERS, generator=generator, dtype=dtype)
        self.targets = torch.randn(64, generator=generator, dtype=dtype)

    def batch(self, size):
        """Indices of a random batch."""
        return torch.randint(0, 64, (size,), generator=self.generator)

    def gradient(self, theta, batch):
        """The mean over the batch."""
        inputs, error = self.inputs[batch], torch.tanh(self.inputs[batch] @ theta)
        slope = (error - self.targets[batch]) * (1 - error**2)
        return (slope[:, None] * inputs).mean(dim=0)
