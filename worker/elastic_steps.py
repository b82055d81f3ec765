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
        *,
        counts_pushes: bool = False,
    ) -> None:
        """moving_rate: alpha. counts_pushes: for the schedule, take the run's samples from how
        often the centre was pushed to, since the number of workers changes."""
        super().__init__(computer, rule, schedule, horizon, start)
        self._moving_rate = moving_rate
        self._counts_pushes = counts_pushes
        self._version, self._pushed_samples = -1, start.samples
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

    def meet(self, version: int) -> None:
        """The centre was pulled at this version, by so many pushes of all workers.

        Each is taken to hold as many samples as this worker's next one.
        """
        if not self._counts_pushes:
            return
        own = sum(num_samples for num_samples, _ in self._steps)
        if self._version >= 0 and own:
            moved = (version - self._version) * own
            self._pushed_samples += moved
            self._samples_per_image = moved / own if moved else self._samples_per_image
            self._clocks = Clocks(self._clocks.updates, self._pushed_samples + own)
        self._version = version

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
