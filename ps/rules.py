"""Optimizer rules, applied with weight decay and the EMA in one pass over cache-sized blocks.

Each rule reads the published parameters and writes the next version into another buffer, so that
pulls never see an update half done.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from model.settings import Settings
from ps.layout import Range

BLOCK_NUMEL = 1 << 18
"""Elements updated at a time: 1 MB of float32 stays in cache between a rule's separate ops."""

Momentum01 = Annotated[float, Field(ge=0, lt=1)]


class _Rule(Settings):
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty of kernels (not of biases nor of BN): weight_decay * w joins the gradient, which
    equals torch's weight_decay and slim's l2_regularizer (half the square)."""

    slots: ClassVar[Mapping[str, float]] = {}
    """Names of the optimizer's per-parameter vectors, and their first values."""

    def step(
        self, theta: Tensor, out: Tensor, gradient: Tensor, slots: Sequence[Tensor], lr: float
    ) -> None:
        """Write the next parameters to `out`; updates `slots` (in their declared order)."""
        raise NotImplementedError


class SGD(_Rule):
    name: Literal["sgd"] = "sgd"
    """Plain gradient descent: w -= lr g."""

    def step(
        self, theta: Tensor, out: Tensor, gradient: Tensor, slots: Sequence[Tensor], lr: float
    ) -> None:
        torch.add(theta, gradient, alpha=-lr, out=out)


class Momentum(_Rule):
    """v = mu v + g; w -= lr v, as TF1's MomentumOptimizer and torch.optim.SGD.

    Keras folds lr into v instead, which differs as soon as lr changes.
    """

    name: Literal["momentum"] = "momentum"
    """Gradient descent with momentum (the paper's ImageNet optimizer)."""
    momentum: Momentum01 = 0.9
    """mu: share of the last step's direction that is kept."""

    slots: ClassVar[Mapping[str, float]] = {"momentum": 0.0}

    def step(
        self, theta: Tensor, out: Tensor, gradient: Tensor, slots: Sequence[Tensor], lr: float
    ) -> None:
        (velocity,) = slots
        velocity.mul_(self.momentum).add_(gradient)
        torch.add(theta, velocity, alpha=-lr, out=out)


class RMSprop(_Rule):
    """TF1's RMSPropOptimizer, which torch.optim.RMSprop is not.

    ms starts at 1; ms += (1 - rho)(g^2 - ms); mom = mu mom + lr g / sqrt(ms + eps); w -= mom.
    torch starts ms at 0, adds eps outside the root and applies lr outside the momentum.
    """

    name: Literal["rmsprop"] = "rmsprop"
    """TF1's RMSprop with momentum (the paper's JFT optimizer)."""
    rho: Momentum01 = 0.9
    """Decay of the mean of squared gradients."""
    momentum: Momentum01 = 0.9
    """mu: share of the last step that is kept."""
    epsilon: PositiveFloat = 1.0
    """Added to the mean of squares under the root (1.0 in Chen et al.'s companion code)."""

    slots: ClassVar[Mapping[str, float]] = {"mean_square": 1.0, "momentum": 0.0}

    def step(
        self, theta: Tensor, out: Tensor, gradient: Tensor, slots: Sequence[Tensor], lr: float
    ) -> None:
        mean_square, momentum = slots
        mean_square.mul_(self.rho).addcmul_(gradient, gradient, value=1 - self.rho)
        scale = torch.add(mean_square, self.epsilon, out=out).rsqrt_()
        momentum.mul_(self.momentum).addcmul_(gradient, scale, value=lr)
        torch.sub(theta, momentum, out=out)


Rule = Annotated[SGD | Momentum | RMSprop, Field(discriminator="name")]


class Ema(Settings):
    """The moving average of parameters and BN statistics (Chen et al. 2016, Algorithm 2)."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """alpha in ema = alpha ema + (1 - alpha) theta, at every update."""
    warmup: bool = False
    """Use min(decay, (1 + n) / (10 + n)) at update n, as TF's num_updates: for short runs, where
    the start would otherwise weigh on the average."""

    def rate(self, updates: int) -> float:
        """alpha of the update that follows `updates` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay


@dataclass(frozen=True)
class Block:
    """A run of elements that are updated at one go; all or none of them decay."""

    span: slice
    decayed: bool


def plan_blocks(numel: int, decayed: Sequence[Range]) -> tuple[Block, ...]:
    """Cut a shard of `numel` elements at every border of decay and every BLOCK_NUMEL elements."""
    return tuple(_blocks(numel, decayed))


def _blocks(numel: int, decayed: Sequence[Range]) -> Iterator[Block]:
    position = 0
    for border, decays in _borders(numel, decayed):
        while position < border:
            stop = min(border, position + BLOCK_NUMEL)
            yield Block(slice(position, stop), decays)
            position = stop


def _borders(numel: int, decayed: Sequence[Range]) -> Iterator[tuple[int, bool]]:
    for span in decayed:
        yield span.start, False
        yield span.stop, True
    yield numel, False


def apply_rule(
    rule: _Rule,
    blocks: Sequence[Block],
    theta: Tensor,
    out: Tensor,
    gradient: Tensor,
    slots: Sequence[Tensor],
    ema: Tensor,
    lr: float,
    ema_decay: float,
) -> None:
    """One update of a shard: weight decay, the rule, and the EMA, block by block.

    All tensors are flat, of one length and dtype. `theta` is read, `out` receives the next
    version and must not share memory with it, `slots` and `ema` are updated, `gradient` is used up
    (weight decay is added to it).
    """
    for block in blocks:
        span = block.span
        g, w, w_out = gradient[span], theta[span], out[span]
        if block.decayed and rule.weight_decay:
            g.add_(w, alpha=rule.weight_decay)
        rule.step(w, w_out, g, [slot[span] for slot in slots], lr)
        ema[span].lerp_(w_out, 1 - ema_decay)
