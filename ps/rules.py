"""Optimizer rules, applied with delay compensation, weight decay and the EMA in one pass.

Each rule reads the published parameters and writes the next version into another buffer, so that
pulls never see an update half done. There are two paths to the same result: fused kernels
(`ps.kernels`), and separate torch ops over cache-sized blocks, for hosts without Numba and for
what the kernels don't take.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from model.settings import Settings
from ps import kernels
from ps.layout import Range

BLOCK_NUMEL = 1 << 18
"""Elements updated at a time: 1 MB of float32 stays in cache between a rule's separate ops."""

Momentum01 = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Compensation:
    """Of a gradient's delay (DC-ASGD, arXiv 1609.08326): g + weight g g (theta - pulled).

    `pulled` is the theta at which g was computed, `weight` the paper's lambda.
    """

    pulled: Tensor
    weight: float


@dataclass(frozen=True)
class Vectors:
    """What an update reads (`theta`, `gradient`) and writes (`out`, `slots`), or a block of it.

    Flat and of one length; `slots` in the order in which their rule declares them.
    """

    theta: Tensor
    out: Tensor
    gradient: Tensor
    slots: Sequence[Tensor]


class _Rule(Settings):
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty of kernels (not of biases nor of BN): weight_decay * w joins the gradient, which
    equals torch's weight_decay and slim's l2_regularizer (half the square). adamw decays w itself
    by lr * weight_decay instead."""

    slots: ClassVar[Mapping[str, float]] = {}
    """Names of the optimizer's per-parameter vectors, and their first values."""

    @property
    def kernel(self) -> kernels.Kernel:
        """The fused form of this rule."""
        raise NotImplementedError

    def constants(self, lr: float, updates: int) -> tuple[float, ...]:
        """What the kernel is given for the update that follows `updates` earlier ones."""
        raise NotImplementedError

    def decay(self, lr: float) -> float:
        """What a decaying w is multiplied with before it joins g (or is taken off w)."""
        return self.weight_decay

    def step(self, at: Vectors, lr: float, updates: int) -> None:
        """The same in torch ops: write `at.out`, update `at.slots`."""
        raise NotImplementedError


class SGD(_Rule):
    name: Literal["sgd"] = "sgd"
    """Plain gradient descent: w -= lr g."""

    @property
    def kernel(self) -> kernels.Kernel:
        return kernels.Kernel(kernels.sgd, num_slots=0, num_constants=1, vector_bits=128)

    def constants(self, lr: float, updates: int) -> tuple[float, ...]:
        return (lr,)

    def step(self, at: Vectors, lr: float, updates: int) -> None:
        torch.add(at.theta, at.gradient, alpha=-lr, out=at.out)


class Momentum(_Rule):
    """v = mu v + g; w -= lr v, as TF1's MomentumOptimizer and torch.optim.SGD.

    Keras folds lr into v instead, which differs as soon as lr changes.
    """

    name: Literal["momentum"] = "momentum"
    """Gradient descent with momentum (the paper's ImageNet optimizer)."""
    momentum: Momentum01 = 0.9
    """mu: share of the last step's direction that is kept."""
    nesterov: bool = False
    """Step along g + mu v instead of v, as torch.optim.SGD does."""

    slots: ClassVar[Mapping[str, float]] = {"momentum": 0.0}

    @property
    def kernel(self) -> kernels.Kernel:
        formula = kernels.nesterov if self.nesterov else kernels.momentum
        return kernels.Kernel(formula, num_slots=1, num_constants=2)

    def constants(self, lr: float, updates: int) -> tuple[float, ...]:
        return self.momentum, lr

    def step(self, at: Vectors, lr: float, updates: int) -> None:
        (velocity,) = at.slots
        velocity.mul_(self.momentum).add_(at.gradient)
        ahead = velocity
        if self.nesterov:
            ahead = torch.add(at.gradient, velocity, alpha=self.momentum, out=at.out)
        torch.add(at.theta, ahead, alpha=-lr, out=at.out)


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

    @property
    def kernel(self) -> kernels.Kernel:
        return kernels.Kernel(kernels.rmsprop, num_slots=2, num_constants=4)

    def constants(self, lr: float, updates: int) -> tuple[float, ...]:
        return kernels.lerp_constant(1 - self.rho), self.momentum, lr, self.epsilon

    def step(self, at: Vectors, lr: float, updates: int) -> None:
        mean_square, momentum = at.slots
        mean_square.mul_(self.rho).addcmul_(at.gradient, at.gradient, value=1 - self.rho)
        scale = torch.add(mean_square, self.epsilon, out=at.out).rsqrt_()
        momentum.mul_(self.momentum).addcmul_(at.gradient, scale, value=lr)
        torch.sub(at.theta, momentum, out=at.out)


class _BiasCorrected(_Rule):
    betas: tuple[Momentum01, Momentum01] = (0.9, 0.999)
    """Decay of the averages of gradients and of their squares."""
    epsilon: PositiveFloat = 1e-8
    """For adam and adamw: added to the root of the mean of squares."""

    slots: ClassVar[Mapping[str, float]] = {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    @property
    def kernel(self) -> kernels.Kernel:
        return kernels.Kernel(kernels.adam, num_slots=2, num_constants=4)

    def constants(self, lr: float, updates: int) -> tuple[float, ...]:
        weights = (kernels.lerp_constant(1 - beta) for beta in self.betas)
        return *weights, *self._corrected(lr, updates)

    def _corrected(self, lr: float, updates: int) -> tuple[float, float]:
        """(step size, epsilon) with which exp_avg and exp_avg_sq need no correction.

        lr (m / c1) / (sqrt(v / c2) + eps) = (lr sqrt(c2) / c1) m / (sqrt(v) + eps sqrt(c2)).
        """
        first, second = (1 - beta ** (updates + 1) for beta in self.betas)
        root = math.sqrt(second)
        return lr * root / first, self.epsilon * root

    def step(self, at: Vectors, lr: float, updates: int) -> None:
        average, square = at.slots
        size, epsilon = self._corrected(lr, updates)
        average.lerp_(at.gradient, 1 - self.betas[0])
        square.mul_(self.betas[1]).addcmul_(at.gradient, at.gradient, value=1 - self.betas[1])
        scale = torch.sqrt(square, out=at.out).add_(epsilon)
        torch.addcdiv(at.theta, average, scale, value=-size, out=at.out)


class Adam(_BiasCorrected):
    """torch.optim.Adam: bias corrected, epsilon outside of the root, L2 in the gradient."""

    name: Literal["adam"] = "adam"
    """Adam (Kingma and Ba 2015), as torch.optim.Adam."""


class AdamW(_BiasCorrected):
    """torch.optim.AdamW: w itself shrinks by lr * weight_decay, which the averages don't see."""

    name: Literal["adamw"] = "adamw"
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as torch.optim.AdamW."""

    @property
    def kernel(self) -> kernels.Kernel:
        return dataclasses.replace(super().kernel, decoupled=True)

    def decay(self, lr: float) -> float:
        return lr * self.weight_decay


Rule = Annotated[SGD | Momentum | RMSprop | Adam | AdamW, Field(discriminator="name")]


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


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a shard, in order, and the same as the kernels' table."""

    blocks: tuple[Block, ...]
    table: kernels.Table

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)


def plan_blocks(numel: int, decayed: Sequence[Range]) -> Blocks:
    """Cut a shard of `numel` elements at every border of decay and every BLOCK_NUMEL elements."""
    blocks = tuple(_blocks(numel, decayed))
    rows = [(block.span.start, block.span.stop, block.decayed) for block in blocks]
    return Blocks(blocks, np.array(rows, np.int64).reshape(-1, 3))


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


def warm_up(
    rule: _Rule,
    gradients: Sequence[torch.dtype] = (torch.float32,),
    compensates: bool = False,
) -> None:
    """Compile what updates with gradients of these dtypes will run, before anybody waits for one.

    compensates: whether there will be updates with `Compensation` as well.
    Takes about a second for each, and nothing where Numba is missing.
    """
    if kernels.available():
        for gradient in gradients:
            kernels.compiled(rule.kernel, gradient, True)  # the cache tells keywords apart
            if compensates:
                kernels.compiled(_compensating(rule), gradient, True)


def _compensating(rule: _Rule) -> kernels.Kernel:
    return dataclasses.replace(rule.kernel, compensates=True)


def apply_rule(
    rule: _Rule,
    blocks: Blocks,
    theta: Tensor,
    out: Tensor,
    gradient: Tensor,
    slots: Sequence[Tensor],
    ema: Tensor | None,
    lr: float,
    ema_decay: float,
    updates: int,
    num_threads: int | None = None,
    compensation: Compensation | None = None,
) -> None:
    """One update of a shard: weight decay, the rule, and the EMA (if there is one).

    compensation: applied to the gradient before all else, in the same pass.

    All tensors are flat and of one length; `gradient` may be bf16, the others have one dtype.
    `theta` and `gradient` are read, `out` receives the next version and must not share memory with
    them, `slots` and `ema` are updated. `updates` counts those since the slots had their first
    values. `num_threads`: None for torch's setting.
    """
    assert out.numel() == 0 or out.data_ptr() != theta.data_ptr(), "out must be another buffer"
    at = Vectors(theta, out, gradient, slots)
    if kernels.accepts(theta, gradient):
        kernels.run(
            rule.kernel if compensation is None else _compensating(rule),
            blocks.table,
            theta,
            out,
            gradient,
            slots,
            ema,
            rule.constants(lr, updates),
            rule.decay(lr),
            1 - ema_decay,
            compensation.pulled if compensation else None,
            compensation.weight if compensation else 0.0,
            num_threads or torch.get_num_threads(),
        )
    else:
        _apply_in_torch(rule, blocks, at, ema, lr, 1 - ema_decay, updates, compensation)


def _apply_in_torch(
    rule: _Rule,
    blocks: Blocks,
    at: Vectors,
    ema: Tensor | None,
    lr: float,
    ema_weight: float,
    updates: int,
    compensation: Compensation | None,
) -> None:
    decoupled = rule.kernel.decoupled
    lengths = blocks.table[:, 1] - blocks.table[:, 0]
    scratch = at.theta.new_empty(int(lengths.max(initial=0)))
    for block in blocks:
        span, decay = block.span, rule.decay(lr) if block.decayed else 0.0
        part = _part(at, span)
        if compensation is not None:
            part = dataclasses.replace(part, gradient=_compensated(part, span, compensation))
        gradient = _effective_gradient(part, 0.0 if decoupled else decay, scratch)
        rule.step(dataclasses.replace(part, gradient=gradient), lr, updates)
        if decoupled and decay:
            part.out.add_(part.theta, alpha=-decay)
        if ema is not None:
            ema[span].lerp_(part.out, ema_weight)


def _part(at: Vectors, span: slice) -> Vectors:
    slots = [slot[span] for slot in at.slots]
    return Vectors(at.theta[span], at.out[span], at.gradient[span], slots)


def _compensated(at: Vectors, span: slice, compensation: Compensation) -> Tensor:
    """As the kernels have it: no product of two gradients alone, which might overflow."""
    gradient = at.gradient.to(at.theta.dtype)
    change = (at.theta - compensation.pulled[span]).mul_(gradient).mul_(compensation.weight)
    return change.mul_(gradient).add_(gradient)


def _effective_gradient(at: Vectors, decay: float, scratch: Tensor) -> Tensor:
    """The gradient in theta's dtype with decay joined to it; a new one lies in `scratch`."""
    gradient = at.gradient
    if gradient.dtype != at.theta.dtype:
        # Cast first: torch is six times slower at adding two dtypes.
        gradient = scratch[: gradient.numel()].copy_(gradient)
    if not decay:
        return gradient
    return torch.add(gradient, at.theta, alpha=decay, out=scratch[: gradient.numel()])
