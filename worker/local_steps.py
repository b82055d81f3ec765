"""Local steps: a worker trains by itself between a pull and a push, with its own optimizer.

What it pushes is the difference of parameters, pulled - now, in place of a gradient. Averaged over
workers and applied with a learning rate of 1, it makes the parameters the mean of the workers':
parameter averaging (Zinkevich et al. 2010, SimuParallelSGD), or DiLoCo (arXiv 2311.08105) with an
outer momentum.
"""

import torch

from ps.layout import plan_layout
from ps.rules import Rule, apply_rule, plan_blocks
from ps.schedule import Clocks, Horizon, Schedule
from worker.data.loader import Batch
from worker.gradient import GradientComputer
from worker.step_report import GradientSummary


class LocalSteps:
    """One worker's optimizer and its copy of what was pulled.

    Slots are kept from one push to the next. The learning rate follows the schedule, with this
    worker's steps for updates and, as all workers' samples, its own times their number.
    """

    def __init__(
        self,
        computer: GradientComputer,
        rule: Rule,
        schedule: Schedule,
        horizon: Horizon,
        start: Clocks,
    ) -> None:
        """`start`: how far the run was when this worker's life began."""
        flat = computer.flat
        self._computer, self._rule = computer, rule
        self._schedule, self._horizon, self._clocks = schedule, horizon, start
        self._samples_per_image: float = horizon.num_workers
        (whole,) = plan_layout(flat.parameter_segments, flat.statistic_segments, 1).shards
        self._blocks = plan_blocks(whole.parameters.numel, whole.decayed)
        self._parameters = torch.empty_like(flat.parameters)
        self._statistics = torch.empty_like(flat.statistics)
        self._after = torch.empty_like(flat.parameters)
        self._slots = self._fresh_slots()
        self._steps: list[tuple[int, GradientSummary]] = []
        """Samples and summary of each step since `begin`."""

    def _fresh_slots(self) -> list[torch.Tensor]:
        parameters = self._computer.flat.parameters
        self._steps_of_slots = 0
        return [torch.full_like(parameters, first) for first in self._rule.slots.values()]

    def begin(self) -> None:
        """After a pull: from here on, differences are taken from what was pulled."""
        self._parameters.copy_(self._computer.flat.parameters)
        self._statistics.copy_(self._computer.flat.statistics)
        self._steps = []

    @property
    def pulled(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Parameters and statistics as they were at `begin`."""
        return self._parameters, self._statistics

    def add(self, batch: Batch) -> None:
        """Train on a batch that holds at least one image."""
        flat, clocks = self._computer.flat, self._clocks
        summary = self._computer.compute(batch)
        apply_rule(
            self._rule,
            self._blocks,
            flat.parameters,
            self._after,
            flat.gradients,
            self._slots,
            None,
            self._schedule.rate(clocks, self._horizon),
            0.0,
            self._steps_of_slots,
        )
        self._steps_of_slots += 1
        flat.parameters.copy_(self._after)
        num_images = batch.labels.num_images
        self._steps.append((num_images, summary))
        num_samples = clocks.samples + round(num_images * self._samples_per_image)
        self._clocks = Clocks(clocks.updates + 1, num_samples)

    def finish(self) -> GradientSummary:
        """Before a push: the differences, in the places of the gradient and of BN's deltas.

        If they are not finite the servers will drop them, and the optimizer begins anew. Returns
        the mean, by samples, over the steps since `begin`.
        """
        flat, delta = self._computer.flat, self._computer.statistics_delta
        torch.sub(self._parameters, flat.parameters, out=flat.gradients)
        torch.sub(flat.statistics, self._statistics, out=delta)
        if not torch.isfinite(flat.gradients.sum() + delta.sum()):
            flat.gradients.fill_(torch.nan)  # all shards drop it, or none
            self._slots = self._fresh_slots()
        return self._mean()

    def _mean(self) -> GradientSummary:
        """By samples, over the steps since `begin`."""
        total = sum(num_samples for num_samples, _ in self._steps)
        return GradientSummary(
            sum(num_samples * each.loss for num_samples, each in self._steps) / total,
            sum(num_samples * each.norm for num_samples, each in self._steps) / total,
        )
