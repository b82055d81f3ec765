"""Worker processes for benchmarks: each loops pull all, push a full gradient, over any exchange.

An exchange is whatever moves the vectors: a lane of ours, or a limit that moves the same bytes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

import torch
from bare_grpc import GrpcExchange
from plain_sockets import Bytes, SocketExchange
from shard_processes import TOKEN, Served, peak_mb, running, start_process
from torch import Tensor

from ps.client import ParameterClient, RetryPolicy
from ps.lanes.lane import LaneSettings
from ps.lanes.segment import shared_zeros
from ps.lanes.stream import bytes_of
from ps.layout import Layout
from ps.malloc import tune_malloc
from ps.receipts import Outcome

AHEAD_S = 0.05
"""Workers are told to begin so long before they do, so that all begin at once."""


class Exchange(Protocol):
    """Moves all vectors one way, then the other."""

    def pull(self) -> None:
        """Fill parameters and statistics."""

    def push(self) -> None:
        """Send gradient and deltas; returns when they have been settled."""


@dataclass(frozen=True)
class Vectors:
    """A worker's vectors, float32, all of them touched."""

    parameters: Tensor
    statistics: Tensor
    gradient: Tensor
    delta: Tensor

    @classmethod
    def of_worker(cls, layout: Layout) -> "Vectors":
        """Gradient and deltas where a worker keeps them: in memory that a server can map."""
        numels = (layout.num_parameters, layout.num_statistics)
        pulled = [torch.zeros(numel).fill_(1.0) for numel in numels]
        pushed = [shared_zeros(numel).fill_(1e-6) for numel in numels]
        return cls(pulled[0], pulled[1], pushed[0], pushed[1])


Open = Callable[[int, Vectors], Exchange]
"""Makes an exchange for a worker of this number; travels to its process."""


class LaneExchange:
    """A lane of ours."""

    def __init__(self, client: ParameterClient, worker: int, vectors: Vectors, drops: bool) -> None:
        self._client, self._worker, self._vectors = client, worker, vectors
        self._versions: Sequence[int] = ()
        self._sequence = 0
        self._drops = drops

    def pull(self) -> None:
        """See Exchange."""
        parameters, statistics = self._vectors.parameters, self._vectors.statistics
        self._versions = self._client.pull(parameters, statistics, worker=self._worker)

    def push(self) -> None:
        """See Exchange."""
        versions = [0] * len(self._versions) if self._drops else self._versions
        gradient, delta = self._vectors.gradient, self._vectors.delta
        receipts = self._client.push(self._worker, 0, self._sequence, versions, 32, gradient, delta)
        self._sequence += 1
        expected = Outcome.STALE if self._drops else Outcome.APPLIED
        assert all(receipt.outcome is expected for receipt in receipts), receipts


@dataclass(frozen=True)
class OpenLane:
    """drops: claim to follow version 0, so that pushes are dropped after all bytes have moved.

    first_worker: numbers of workers begin here, since a shard tells pushes apart by them.
    """

    addresses: Sequence[str]
    layout: Layout
    lanes: LaneSettings
    drops: bool = False
    first_worker: int = 0

    def __call__(self, worker: int, vectors: Vectors) -> Exchange:
        client = ParameterClient(self.addresses, self.layout, TOKEN, RetryPolicy(), self.lanes)
        client.connect()
        return LaneExchange(client, self.first_worker + worker, vectors, self.drops)


@dataclass(frozen=True)
class OpenLimit:
    """Plain sockets or a bare gRPC stream to server processes, each with its range of a layout."""

    kind: type[SocketExchange] | type[GrpcExchange]
    addresses: Sequence[tuple[str, int]]
    layout: Layout

    def __call__(self, worker: int, vectors: Vectors) -> Exchange:
        pulled = _ranges(self.layout, vectors.parameters)
        pushed = _ranges(self.layout, vectors.gradient)
        return self.kind(self.addresses, pulled, pushed)


def _ranges(layout: Layout, vector: Tensor) -> list[Bytes]:
    return [bytes_of(vector[shard.parameters.slice()]) for shard in layout.shards]


@dataclass(frozen=True)
class Loop:
    """What one worker did in one run; `pull_s` and `push_s` are means of one."""

    num_updates: int
    elapsed_s: float
    pull_s: float
    push_s: float
    cpu_s: float
    peak_mb: float


def loop(exchange: Exchange, start_s: float, seconds: float) -> Loop:
    """Pull and push from `start_s` of the monotonic clock on; a cycle that has begun is ended."""
    time.sleep(max(0.0, start_s - time.monotonic()))
    cpu_s, begin_s, num_updates, pull_s = time.process_time(), time.monotonic(), 0, 0.0
    now_s = begin_s
    while now_s < begin_s + seconds:
        exchange.pull()
        pull_s += time.monotonic() - now_s
        exchange.push()
        now_s = time.monotonic()
        num_updates += 1
    elapsed_s = now_s - begin_s
    push_s = (elapsed_s - pull_s) / num_updates
    cpu_s = time.process_time() - cpu_s
    return Loop(num_updates, elapsed_s, pull_s / num_updates, push_s, cpu_s, peak_mb())


@dataclass(frozen=True)
class _Run:
    name: str
    start_s: float
    seconds: float


class Workers:
    """Processes that know exchanges by name."""

    def __init__(self, processes: Sequence[Served]) -> None:
        self._processes = processes

    def open(self, name: str, exchange: Open) -> None:
        """Have every worker make an exchange."""
        for served in self._processes:
            served.pipe.send((name, exchange))
        for served in self._processes:
            served.pipe.recv()

    def run(self, name: str, num_workers: int, seconds: float) -> list[Loop]:
        """Let the first `num_workers` loop at once."""
        chosen = self._processes[:num_workers]
        order = _Run(name, time.monotonic() + AHEAD_S, seconds)
        for served in chosen:
            served.pipe.send(order)
        return [served.pipe.recv() for served in chosen]


@contextmanager
def workers(num_workers: int, layout: Layout) -> Iterator[Workers]:
    """So many idle worker processes."""
    processes = [start_process(_work, worker, layout) for worker in range(num_workers)]
    with running(processes):
        yield Workers(processes)


def _work(worker: int, layout: Layout, pipe: Connection) -> None:
    torch.set_num_threads(1)
    tune_malloc()
    vectors, exchanges = Vectors.of_worker(layout), dict[str, Exchange]()
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        if isinstance(order, _Run):
            pipe.send(loop(exchanges[order.name], order.start_s, order.seconds))
        else:
            name, exchange = order
            exchanges[name] = exchange(worker, vectors)
            pipe.send(None)
