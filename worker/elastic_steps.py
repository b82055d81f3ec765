"""Elastic averaging: a worker trains by itself, and is drawn to the centre that the servers hold.

Every tau steps it pulls the centre c and computes e = alpha (x - c) from its own parameters x. Then
x becomes x - e, and the servers, to which it pushes -e in place of a gradient, make c + e of the
centre (EASGD, Zhang et al. 2015, arXiv 1412.6651, Algorithm 1). What leaves x arrives in c, so that
c plus the sum of all x changes by the workers' own steps alone. BN statistics go the same way.
"""

import torch

from ps.rules import Rule
from ps.schedule import Clocks, Horizon, Schedule
from worker.gradient import GradientComputer
from worker.local_steps import LocalSteps
from worker.step_report import GradientSummary


class ElasticSteps(LocalSteps):
    """One worker's optimizer, whose parameters stay its own: a life begins at the centre."""

    def __init__(
        self,
        computer: GradientComputer,
        rule: Rule,
        schedule: Schedule,
        horizon: Horizon,
        start: Clocks,
        moving_rate: float,
    ) -> None:
        """moving_rate: alpha."""
        super().__init__(computer, rule, schedule, horizon, start)
        self._moving_rate = moving_rate
        self.has_begun = False
        """Whether the model holds parameters of its own."""

    def begin(self) -> None:
        """From here on the model's parameters are this worker's own."""
        self.has_begun = True
        self._steps = []

    @property
    def pulled(self) -> None:
        """The centre is kept nowhere: what the model and its copies hold is the worker's own."""
        return None

    def set_aside(self) -> None:
        """Before the pull of the centre, which takes the place of the worker's own in the model."""
        self._parameters.copy_(self._computer.flat.parameters)
        self._statistics.copy_(self._computer.flat.statistics)

    def finish(self) -> GradientSummary:
        """With the centre in the model: leave there what is the worker's own after the move.

        In the places of the gradient and of BN's deltas is what the servers take. If that is not
        finite they drop it, and the worker begins anew, at the centre. Returns the mean, by
        samples, over the steps since `begin`.
        """
        flat, delta = self._computer.flat, self._computer.statistics_delta
        torch.sub(flat.parameters, self._parameters, out=flat.gradients).mul_(self._moving_rate)
        torch.sub(self._statistics, flat.statistics, out=delta).mul_(self._moving_rate)
        if torch.isfinite(flat.gradients.sum() + delta.sum()):
            torch.add(self._parameters, flat.gradients, out=flat.parameters)
            torch.sub(self._statistics, delta, out=flat.statistics)
        else:
            flat.gradients.fill_(torch.nan)  # all shards drop it, or none
            self._slots = self._fresh_slots()
        return self._mean()
