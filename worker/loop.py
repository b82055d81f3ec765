"""Algorithms 1 and 3 of Chen et al. (arXiv 1604.00981): pull, compute, push."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from ps.client import ParameterClient
from ps.shard import Outcome, Receipt
from worker.data.loader import Batch
from worker.gradient import GradientComputer, GradientSummary, HostVectors
from worker.local_steps import LocalSteps


@dataclass
class StepReport:
    """What became of the batches of one push; durations in seconds.

    Without images there was no push, and no gradient. `gradient` is the mean over the batches.
    """

    sequence: int
    num_samples: int = 0
    corrupt_keys: Sequence[str] = ()
    gradient: GradientSummary | None = None
    receipts: Sequence[Receipt] = ()
    data_s: float = 0.0
    pull_s: float = 0.0
    compute_s: float = 0.0
    push_s: float = 0.0
    lost: Mapping[str, int] = field(default_factory=dict)
    """Samples left out with their shard, by its name."""


class WorkerLoop:
    """One life of one worker. Push number n of this life, from 0, holds its n-th group of batches.

    waits: pull only what is newer than what the last push was computed from.
    local: the worker's own optimizer; without it, a push is the gradient of one batch.
    batches_per_push: with `local`, the batches of a group; None puts all into one.
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
        batches_per_push: int | None = 1,
    ) -> None:
        assert local is not None or batches_per_push == 1
        self._worker, self._incarnation = worker, incarnation
        self._computer, self._client = computer, client
        self._vectors = HostVectors(computer)
        self._clock = clock
        self._waits = waits
        self._local, self._batches_per_push = local, batches_per_push
        self._at_least: Sequence[int] | None = None

    def run(self, batches: Iterable[Batch], report: Callable[[StepReport], None]) -> None:
        """Work through all batches, reporting each group after its receipts.

        Raises ShardUnavailable, and what `batches` and `report` raise.
        """
        waiting = _Waiting(self._clock)
        groups = _groups(waiting.timed(batches), self._batches_per_push)
        for sequence, group in enumerate(groups):
            done = StepReport(sequence)
            self._work(group, done)
            done.data_s = waiting.take_s()
            report(done)

    def _work(self, group: Iterable[Batch], done: StepReport) -> None:
        summaries: list[tuple[int, GradientSummary]] = []
        versions: Sequence[int] = ()
        for batch in group:
            done.corrupt_keys = (*done.corrupt_keys, *batch.corrupt_keys)
            done.lost = _sum(done.lost, batch.lost)
            if batch.labels.num_images == 0:
                continue
            if not summaries:
                versions = self._pull(done)
            summaries.append((batch.labels.num_images, self._compute(batch, done)))
        if summaries:
            done.num_samples = sum(num_samples for num_samples, _ in summaries)
            done.gradient = _mean(summaries)
            self._push(versions, done)

    def _pull(self, done: StepReport) -> Sequence[int]:
        start_s = self._clock()
        vectors = self._vectors
        versions = self._client.pull(vectors.parameters, vectors.statistics, self._at_least)
        vectors.to_device()
        if self._local is not None:
            self._local.begin()
        done.pull_s = self._clock() - start_s
        return versions

    def _compute(self, batch: Batch, done: StepReport) -> GradientSummary:
        start_s = self._clock()
        step = self._computer.compute if self._local is None else self._local.step
        summary = step(batch)
        done.compute_s += self._clock() - start_s
        return summary

    def _push(self, versions: Sequence[int], done: StepReport) -> None:
        start_s = self._clock()
        if self._local is not None:
            self._local.end()
        vectors = self._vectors
        vectors.to_host()
        done.receipts = self._client.push(
            self._worker,
            self._incarnation,
            done.sequence,
            versions,
            done.num_samples,
            vectors.gradients,
            vectors.statistics_delta,
        )
        if self._waits:
            self._at_least = _versions_to_come(versions, done.receipts)
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


def _sum(counts: Mapping[str, int], more: Mapping[str, int]) -> Mapping[str, int]:
    if not more:
        return counts
    return {name: counts.get(name, 0) + more.get(name, 0) for name in {**counts, **more}}


def _mean(summaries: Sequence[tuple[int, GradientSummary]]) -> GradientSummary:
    """By samples."""
    total = sum(num_samples for num_samples, _ in summaries)
    return GradientSummary(
        sum(num_samples * each.loss for num_samples, each in summaries) / total,
        sum(num_samples * each.norm for num_samples, each in summaries) / total,
    )


def _versions_to_come(pulled: Sequence[int], receipts: Sequence[Receipt]) -> list[int]:
    """The versions to wait for (Algorithm 3), by shard.

    A shard that dropped a gradient for its numbers still lacks one of this worker for the version
    at hand, and would wait for it while this worker waited for the next version.
    """
    return [
        version + (receipt.outcome in _MAKES_NEXT)
        for version, receipt in zip(pulled, receipts, strict=True)
    ]


_MAKES_NEXT = (Outcome.APPLIED, Outcome.ACCUMULATED, Outcome.STALE)
"""Outcomes after which the next version is there or comes without this worker's doing."""
