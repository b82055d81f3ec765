"""What stops a run that can't end well, and what people are told of one that may not."""

import math
from collections.abc import Collection, Iterator
from typing import Final

from asynception.config import TrainConfig
from asynception.failures import Diverged
from asynception.totals import Totals, staleness_summary
from model.errors import InputError
from ps.shard import Outcome

WINDOW_PUSHES_PER_WORKER: Final = 25
"""Pushes over which staleness and loss are averaged before anything is said of them."""


class Alarms:
    """Stops a run that can't end well."""

    def __init__(self, config: TrainConfig, before: Totals) -> None:
        self._config, self._before = config, before

    def check(self, totals: Totals, checkpoint: str | None) -> None:
        """Raises Diverged or InputError when a limit of the settings is passed.

        checkpoint: name of the last one from before the loss rose.
        """
        self._check_corrupt(totals.corrupt)
        self._check_lost(totals.lost)
        num_servers = self._config.scaling.num_servers
        name = Outcome.NOT_FINITE.value
        dropped = (totals.outcomes[name] - self._before.outcomes[name]) // num_servers
        if dropped > self._config.training.max_not_finite:
            raise Diverged(
                f"{dropped} gradients held NaN or Inf, and training.max_not_finite = "
                f"{self._config.training.max_not_finite}; lower schedule.lr or set "
                "training.clip_norm",
                checkpoint,
            )

    def _check_corrupt(self, keys: Collection[str]) -> None:
        if len(keys) > self._config.data.max_corrupt:
            raise InputError(
                f"{len(keys)} images can't be decoded ({min(keys)} is one), and data.max_corrupt = "
                f"{self._config.data.max_corrupt}: mend the data or raise the limit"
            )

    def _check_lost(self, lost: Collection[str]) -> None:
        if len(lost) > self._config.data.max_lost_shards:
            raise InputError(
                f"{len(lost)} shards can't be had ({min(lost)} is one), and data.max_lost_shards = "
                f"{self._config.data.max_lost_shards}: restore them or raise the limit"
            )


class Watch:
    """Tells of what may end badly, once for each thing until it has passed.

    A checkpoint is good once the loss over the window in which it was written didn't rise.
    """

    def __init__(
        self, config: TrainConfig, before: Totals, good_checkpoint: str | None = None
    ) -> None:
        """before: what was counted when the session began, with this checkpoint if any."""
        self._stops = config.training.on_divergence != "warn"
        self.good_checkpoint, self._newest_checkpoint = good_checkpoint, good_checkpoint
        self._is_range = config.scaling.is_range
        self._num_workers = config.scaling.min_workers
        self._mark = before
        self._first = self._lowest = before.mean_loss
        self._told_of_staleness = False
        self.diverging = False
        """Whether half of what had been gained on the loss was lost when it was last looked at."""

    def saved(self, checkpoint: str) -> None:
        """A checkpoint of this name has been written."""
        if not self.diverging:
            self._newest_checkpoint = checkpoint

    def spared(self) -> set[str]:
        """The checkpoints that the run may go back to: the last good one, and what may become it.

        May be asked from any thread.
        """
        names = (self.good_checkpoint, self._newest_checkpoint)
        return {name for name in names if name is not None}

    def warnings(self, totals: Totals, num_workers: int = 1) -> Iterator[str]:
        """What is to be said now. Raises Diverged if a rising loss is to stop the session.

        num_workers: at work now. Where they come and go, a window is as long, and staleness as
        high, as is due with the most that were at work in it.
        """
        if self._is_range:
            self._num_workers = max(self._num_workers, num_workers)
        window = totals.since(self._mark)
        if window.pushes < WINDOW_PUSHES_PER_WORKER * self._num_workers:
            return
        self._mark = totals.copy()
        yield from self._staleness(window)
        if self._is_range:
            self._num_workers = max(1, num_workers)
        if self._loss_rose(window.mean_loss) and not self.diverging:
            self.diverging = True
            error = Diverged(
                f"the loss rises, {window.mean_loss:.4g} over the last {window.pushes} pushes, "
                f"{self._lowest:.4g} at its lowest; a lower schedule.lr, training.clip_norm or "
                "schedule.warmup may help",
                self.good_checkpoint,
            )
            if self._stops:
                raise error
            yield str(error)
        elif not self._loss_rose(window.mean_loss):
            self.diverging = False
            self.good_checkpoint = self._newest_checkpoint

    def _staleness(self, window: Totals) -> Iterator[str]:
        mean = staleness_summary(window.staleness)["mean"]
        if mean > self._num_workers and not self._told_of_staleness:
            self._told_of_staleness = True
            yield (
                f"gradients are stale: by {mean:.1f} versions on average over the last "
                f"{window.pushes} pushes, more than the {self._num_workers} workers; some workers "
                "are much slower than others, or pipeline.overlap adds to it; "
                "consistency.max_staleness drops the stalest"
            )

    def _loss_rose(self, loss: float) -> bool:
        if math.isnan(loss):
            return False
        if math.isnan(self._first):
            self._first = self._lowest = loss
        self._lowest = min(self._lowest, loss)
        return loss > max(2 * self._lowest, (self._first + self._lowest) / 2)
