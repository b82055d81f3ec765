"""A worker that is slow on purpose, to see what a mode makes of it.

A tool for experiments: it sleeps, so it takes no core from the others. On a machine with fewer
cores than workers these then go faster than they would beside one that is slow because it computes.
"""

import time
from collections.abc import Callable

from model.flat import FlatModule
from worker.compute import ComputeSettings
from worker.data.loader import Batch
from worker.gradient import GradientComputer
from worker.objective import Objective


class Straggler(GradientComputer):
    """Takes `factor` times as long for each gradient as it would by itself."""

    def __init__(
        self,
        flat: FlatModule,
        objective: Objective,
        clip_norm: float | None,
        compute: ComputeSettings | None = None,
        *,
        factor: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """factor: at least 1, which sleeps not at all."""
        assert factor >= 1
        super().__init__(flat, objective, clip_norm, compute)
        self._factor, self._clock, self._sleep = factor, clock, sleep

    def add(self, batch: Batch) -> None:
        """Add a batch's gradient, late; see `GradientComputer.add`."""
        start_s = self._clock()
        super().add(batch)
        self._sleep((self._factor - 1) * (self._clock() - start_s))
