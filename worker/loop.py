"""Algorithms 1 and 3 of Chen et al. (arXiv 1604.00981): pull, compute, push."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ps.client import ParameterClient
from ps.shard import Outcome, Receipt
from worker.data.loader import Batch
from worker.gradient import GradientComputer, GradientSummary, HostVectors


@dataclass(frozen=True)
class StepReport:
    """What became of one batch; durations in seconds. Without images there was no push."""

    sequence: int
    num_samples: int
    corrupt_keys: Sequence[str]
    gradient: GradientSummary | None
    receipts: Sequence[Receipt]
    data_s: float = 0.0
    pull_s: float = 0.0
    compute_s: float = 0.0
    push_s: float = 0.0
    lost: Mapping[str, int] = field(default_factory=dict)
    """Samples left out with their shard, by its name."""


class WorkerLoop:
    """One life of one worker. Batch number n of this life is push number n, from 0."""

    def __init__(
        self,
        worker: int,
        incarnation: int,
        computer: GradientComputer,
        client: ParameterClient,
        clock: Callable[[], float] = time.perf_counter,
        *,
        waits: bool = False,
    ) -> None:
        """waits: pull only what is newer than what the last push was computed from."""
        self._worker, self._incarnation = worker, incarnation
        self._computer, self._client = computer, client
        self._vectors = HostVectors(computer)
        self._clock = clock
        self._waits = waits
        self._at_least: Sequence[int] | None = None

    def run(self, batches: Iterable[Batch], report: Callable[[StepReport], None]) -> None:
        """Work through all batches, reporting each after its receipts.

        Raises ShardUnavailable, and what `batches` and `report` raise.
        """
        waiting_since_s = self._clock()
        for sequence, batch in enumerate(batches):
            data_s = self._clock() - waiting_since_s
            report(self._step(sequence, batch, data_s))
            waiting_since_s = self._clock()

    def _step(self, sequence: int, batch: Batch, data_s: float) -> StepReport:
        num_samples = batch.labels.num_images
        if num_samples == 0:
            return StepReport(sequence, 0, batch.corrupt_keys, None, (), data_s, lost=batch.lost)
        vectors = self._vectors
        start_s = self._clock()
        versions = self._client.pull(vectors.parameters, vectors.statistics, self._at_least)
        vectors.to_device()
        pulled_s = self._clock()
        summary = self._computer.compute(batch)
        vectors.to_host()
        computed_s = self._clock()
        receipts = self._client.push(
            self._worker,
            self._incarnation,
            sequence,
            versions,
            num_samples,
            vectors.gradients,
            vectors.statistics_delta,
        )
        if self._waits:
            self._at_least = _versions_to_come(versions, receipts)
        return StepReport(
            sequence,
            num_samples,
            batch.corrupt_keys,
            summary,
            receipts,
            data_s,
            pull_s=pulled_s - start_s,
            compute_s=computed_s - pulled_s,
            push_s=self._clock() - computed_s,
            lost=batch.lost,
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
