"""Momentum over differences of parameters that come one by one, and stale."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import PositiveInt

from ps import kernels
from ps.rules import Momentum, Vectors


class DelayedNesterov(Momentum):
    """The servers' rule of asynchronous averaging with momentum (arXiv 2401.09135, Algorithm 3).

    Every push moves w by lr g / N; the N-th also joins the mean of the last N to the velocity,
    v = mu v + mean(g), and moves w by lr mu v. N updates that met the same w are then one Nesterov
    step with their mean. (The paper's momentum activation c is at its default, 0.)
    """

    every: PositiveInt
    """N: pushes of one momentum step."""

    slots: ClassVar[Mapping[str, float]] = {"momentum": 0.0, "gathered": 0.0}

    @property
    def kernel(self) -> kernels.Kernel:
        return kernels.Kernel(kernels.delayed_nesterov, num_slots=2, num_constants=5)

    def constants(self, lr: float, updates: int) -> tuple[float, ...]:
        share = 1 / self.every
        if (updates + 1) % self.every:
            return 1.0, 0.0, 0.0, lr * share, 1.0
        return self.momentum, share, lr * self.momentum, lr * share, 0.0

    def step(self, at: Vectors, lr: float, updates: int) -> None:
        velocity, gathered = at.slots
        keep, share, of_velocity, of_gradient, rest = self.constants(lr, updates)
        gathered.add_(at.gradient)
        velocity.mul_(keep).add_(gathered, alpha=share)
        torch.add(at.theta, at.gradient, alpha=-of_gradient, out=at.out)
        at.out.add_(velocity, alpha=-of_velocity)
        gathered.mul_(rest)
