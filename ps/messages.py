"""Between the shard's own objects and protobuf messages."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from protos import parameter_server_pb2 as pb
from ps.lanes.stream import StreamError
from ps.push import NewestPushes
from ps.schedule import Clocks
from ps.shard import Outcome, Receipt, ShardState

WorkerSequences = Mapping[int, Mapping[int, int]]
"""Newest settled sequence by worker and incarnation."""

_OUTCOMES = {
    Outcome.APPLIED: pb.APPLIED,
    Outcome.ACCUMULATED: pb.ACCUMULATED,
    Outcome.STALE: pb.STALE,
    Outcome.NOT_FINITE: pb.NOT_FINITE,
    Outcome.FENCED: pb.FENCED,
}
_OUTCOMES_BACK = {message: outcome for outcome, message in _OUTCOMES.items()}


@dataclass(frozen=True)
class ReplicaStatus:
    """How a shard's standby is doing: see `ReplicaStatus` of the protocol."""

    epoch: int
    state: str
    num_behind: int = 0
    waiting_s: float = 0.0
    error: str = ""
    waited_s: float = 0.0


@dataclass(frozen=True)
class ShardStatus:
    """A shard's clocks and counters.

    Pushes by outcome, seconds in updates, buffers in memory, calls without the run's token.
    `queue_s` adds up what pushes waited for others to be applied, `gate_s` what pulls waited for a
    version or to be let go on; `num_pins` counts readers of buffers, and versions kept.
    """

    clocks: Clocks
    last_sequences: WorkerSequences = field(default_factory=dict)
    num_buffers: int = 0
    pushes: Mapping[str, int] = field(default_factory=dict)
    apply_s: float = 0.0
    num_uncompensated: int = 0
    unauthenticated: int = 0
    queue_s: float = 0.0
    gate_s: float = 0.0
    num_pins: int = 0
    replica: ReplicaStatus | None = None


def receipt_message(receipt: Receipt) -> pb.Receipt:
    return pb.Receipt(
        outcome=_OUTCOMES[receipt.outcome],
        version=receipt.version,
        staleness=receipt.staleness,
        lr=receipt.lr,
        checksum=receipt.checksum,
    )


def receipt_from(message: pb.Receipt) -> Receipt:
    """Raises StreamError for an outcome that stands for nothing."""
    outcome = _OUTCOMES_BACK.get(message.outcome)
    if outcome is None:
        raise StreamError(f"a receipt with outcome {message.outcome}")
    return Receipt(outcome, message.version, message.staleness, message.lr, message.checksum)


def clocks_message(clocks: Clocks) -> pb.Clocks:
    return pb.Clocks(updates=clocks.updates, samples=clocks.samples)


def clocks_from(message: pb.Clocks) -> Clocks:
    return Clocks(message.updates, message.samples)


def worker_clock_messages(sequences: WorkerSequences) -> list[pb.WorkerClock]:
    return [pb.WorkerClock(worker=w, last_sequences=s) for w, s in sorted(sequences.items())]


def sequences_from(messages: Iterable[pb.WorkerClock]) -> dict[int, dict[int, int]]:
    return {m.worker: dict(m.last_sequences) for m in messages}


def newest_pushes_message(newest: NewestPushes) -> pb.NewestPushes:
    return pb.NewestPushes(
        workers=newest,
        incarnations=[incarnation for incarnation, _ in newest.values()],
        sequences=[sequence for _, sequence in newest.values()],
    )


def newest_pushes_from(message: pb.NewestPushes) -> dict[int, tuple[int, int]]:
    """Raises StreamError for lists that don't go together."""
    try:
        pushes = zip(message.incarnations, message.sequences, strict=True)
        return dict(zip(message.workers, pushes, strict=True))
    except ValueError as error:
        raise StreamError(f"newest pushes: {error}") from error


def status_message(status: ShardStatus) -> pb.Status:
    return pb.Status(
        clocks=clocks_message(status.clocks),
        workers=worker_clock_messages(status.last_sequences),
        num_buffers=status.num_buffers,
        pushes=status.pushes,
        apply_s=status.apply_s,
        num_uncompensated=status.num_uncompensated,
        unauthenticated=status.unauthenticated,
        queue_s=status.queue_s,
        gate_s=status.gate_s,
        num_pins=status.num_pins,
        replica=_replica_message(status.replica),
    )


def status_from(message: pb.Status) -> ShardStatus:
    return ShardStatus(
        clocks_from(message.clocks),
        sequences_from(message.workers),
        message.num_buffers,
        dict(message.pushes),
        message.apply_s,
        message.num_uncompensated,
        message.unauthenticated,
        message.queue_s,
        message.gate_s,
        message.num_pins,
        _replica_from(message),
    )


def _replica_message(status: ReplicaStatus | None) -> pb.ReplicaStatus | None:
    if status is None:
        return None
    return pb.ReplicaStatus(
        epoch=status.epoch,
        state=status.state,
        num_behind=status.num_behind,
        waiting_s=status.waiting_s,
        error=status.error,
        waited_s=status.waited_s,
    )


def _replica_from(message: pb.Status) -> ReplicaStatus | None:
    if not message.HasField("replica"):
        return None
    given = message.replica
    return ReplicaStatus(
        given.epoch, given.state, given.num_behind, given.waiting_s, given.error, given.waited_s
    )


def state_header(state: ShardState) -> pb.StateHeader:
    """Describes `state`, whose vectors follow on the stream in this header's order."""
    return pb.StateHeader(
        clocks=clocks_message(state.clocks),
        vectors=[pb.Vector(name=n, numel=v.numel()) for n, v in state.vectors.items()],
        workers=worker_clock_messages(state.last_sequences),
    )


def state_from(header: pb.StateHeader, vectors: Mapping[str, Tensor]) -> ShardState:
    return ShardState(clocks_from(header.clocks), vectors, sequences_from(header.workers))
