"""Algorithms 1 and 3 of Chen et al. (arXiv 1604.00981): pull, compute, push."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice, takewhile
from typing import Protocol

from torch import Tensor

from ps.client import ParameterClient
from worker.data.loader import Batch
from worker.elastic_steps import ElasticSteps
from worker.exchange import Outgoing
from worker.gradient import GradientComputer
from worker.holdings import Holdings
from worker.local_steps import LocalSteps
from worker.pipeline import Pipeline, PipelineSettings
from worker.step_report import GradientSummary, StepReport


class Work(Protocol):
    """What a worker makes of the batches of one push."""

    @property
    def pulled(self) -> tuple[Tensor, Tensor] | None:
        """Parameters and BN statistics as they were at `begin`."""

    def begin(self) -> None:
        """With what was pulled in the model."""

    def add(self, batch: Batch) -> None:
        """Work on a batch that holds at least one image."""

    def finish(self) -> GradientSummary:
        """Leave in the flat vectors what is to be pushed."""


class NodeWork(Work, Protocol):
    """The same where other processes of the node work on batches of the same push."""

    def gather(self, done: StepReport) -> None:
        """Add what the others bring: their samples, and what they left out. Before `finish`."""


class WorkerLoop:
    """One life of one worker. Push number n of this life, from 0, holds its n-th group of batches.

    waits: pull only what is newer than what the last push was computed from.
    local: the worker's own optimizer; without it, a push is the gradient of its batches. With
    `ElasticSteps` the pull comes right before the push, and before the first step of the life.
    node: what sums it up over the processes of a node. These may have images where this one's
    batches have none, so each group begins with a pull.
    batches_per_push: the batches of a group, of this process; None, with `local` alone, puts all
    into one.
    beat: called now and then while the worker waits for servers, or at them for other workers.
    """

    def __init__(
        self,
        worker: int,
        incarnation: int,
        computer: GradientComputer,
        client: ParameterClient,
        clock: Callable[[], float] = time.perf_counter,
        *,
        waits: bool = False,
        local: LocalSteps | None = None,
        node: NodeWork | None = None,
        batches_per_push: int | None = 1,
        pipeline: PipelineSettings | None = None,
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        settings = pipeline or PipelineSettings()
        assert local is not None or batches_per_push is not None
        assert not settings.early_push or (batches_per_push == 1 and node is None)
        assert local is None or node is None
        work: Work = node or local or computer
        self._pipeline = Pipeline(
            worker, incarnation, computer, client, settings, waits, lambda: work.pulled, beat
        )
        self._overlap, self._node, self._work = settings.overlap, node, work
        self._elastic = local if isinstance(local, ElasticSteps) else None
        self._clock = clock
        self._batches_per_push = batches_per_push
        self._open: deque[tuple[StepReport, Outgoing | None]] = deque()
        self._leaving = False

    def leave(self) -> None:
        """Have `run` end after the push at hand. Any thread may ask, and a signal's handler."""
        self._leaving = True

    def _stays(self, _: object) -> bool:
        return not self._leaving

    @property
    def holdings(self) -> Holdings:
        """What is left of what was pulled; any thread may ask."""
        return self._pipeline.holdings

    def run(self, batches: Iterable[Batch], report: Callable[[StepReport], None]) -> None:
        """Work through all batches, reporting each group, in order, after its receipts.

        After `leave`, what is left of the batches is not worked on. Raises ShardUnavailable, and
        what `batches` and `report` raise.
        """
        waiting = _Waiting(self._clock)
        groups = takewhile(self._stays, _groups(waiting.timed(batches), self._batches_per_push))
        for sequence, group in enumerate(groups):
            done = StepReport(sequence)
            outgoing = self._train(group, done)
            done.data_s = waiting.take_s()
            self._open.append((done, outgoing))
            self._report(report, wait=not self._overlap)
        self._report(report, wait=True)
        self._pipeline.close()

    def _report(self, report: Callable[[StepReport], None], wait: bool) -> None:
        """Report steps that are settled; with `wait`, all."""
        while self._open:
            done, outgoing = self._open[0]
            if outgoing is not None:
                if not (wait or outgoing.settled):
                    return
                start_s = self._clock()
                done.receipts = self._pipeline.settle(outgoing)
                done.lanes = self._pipeline.lanes
                done.push_s += self._clock() - start_s
            self._open.popleft()
            report(done)

    def _train(self, group: Iterable[Batch], done: StepReport) -> Outgoing | None:
        """Compute and hand over one push; None if there is nothing to push."""
        outgoing = self._begin(done) if self._node else None
        for batch in group:
            done.corrupt_keys = (*done.corrupt_keys, *batch.corrupt_keys)
            done.lost = sum_counts(done.lost, batch.lost)
            if batch.labels.num_images == 0:
                continue
            done.num_samples += batch.labels.num_images
            outgoing = outgoing or self._begin(done)
            start_s = self._clock()
            self._work.add(batch)
            done.compute_s += self._clock() - start_s
        if self._node is not None:
            start_s = self._clock()
            self._node.gather(done)
            done.compute_s += self._clock() - start_s
        if outgoing is None or not done.num_samples:
            return None
        self._finish(outgoing, done)
        return outgoing

    def _begin(self, done: StepReport) -> Outgoing:
        start_s = self._clock()
        goes_on = self._elastic is not None and self._elastic.has_begun
        versions = () if goes_on else self._pipeline.enter()
        if self._elastic is not None and not goes_on:
            self._elastic.meet(versions[0])
        self._work.begin()
        done.pull_s = self._clock() - start_s
        return self._pipeline.open(done.sequence, versions, done.num_samples)

    def _finish(self, outgoing: Outgoing, done: StepReport) -> None:
        start_s = self._clock()
        if self._elastic is not None:
            self._elastic.set_aside()
            outgoing.pulled_versions = self._pipeline.enter()
            self._elastic.meet(outgoing.pulled_versions[0])
            done.pull_s += self._clock() - start_s
            start_s = self._clock()
        done.gradient = self._work.finish()
        done.compute_s += self._clock() - start_s
        start_s = self._clock()
        outgoing.num_samples = done.num_samples
        self._pipeline.hand_over(outgoing)
        done.push_s = self._clock() - start_s


class _Waiting:
    """Adds up the seconds that a consumer waits for batches."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waited_s = 0.0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        start_s = self._clock()
        for batch in batches:
            self._waited_s += self._clock() - start_s
            yield batch
            start_s = self._clock()

    def take_s(self) -> float:
        """The seconds since this was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s


def _groups(batches: Iterator[Batch], size: int | None) -> Iterator[Iterator[Batch]]:
    """Runs of `size` batches, the last one shorter; None makes one of all.

    A group must be used up before the next is asked for.
    """
    for first in batches:
        yield chain([first], islice(batches, None if size is None else size - 1))


def sum_counts(counts: Mapping[str, int], more: Mapping[str, int]) -> Mapping[str, int]:
    """Both together, by name."""
    if not more:
        return counts
    return {name: counts.get(name, 0) + more.get(name, 0) for name in {**counts, **more}}
