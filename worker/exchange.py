"""One worker's pulls and pushes: to each shard one after another, to all shards at once."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from ps.client import ParameterClient
from ps.lanes.lane import LaneName
from ps.push import Push
from ps.shard import Receipt
from ps.snapshot import Pulled
from worker.host_vectors import HostVectors, Mailbox, Wait

T = TypeVar("T")

BEAT_S = 1.0
"""Whoever waits for calls says so that often."""


class Chain:
    """Calls that are made one after another in a thread of their own.

    The thread doesn't hold up the process's end: a call under way may wait for others for long.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        """Have it called after all that was submitted before."""
        ending: Future[T] = Future()

        def run() -> None:
            try:
                ending.set_result(call())
            except BaseException as error:  # it is the waiting thread's to handle
                ending.set_exception(error)

        self._calls.put(run)
        return ending

    def close(self) -> None:
        """End the thread after the calls that were submitted."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def ended(endings: Sequence["Future[T]"], beat: Callable[[], object]) -> list[T]:
    """The results of all calls, once all have ended: none uses its vectors after an error.

    beat: called now and then meanwhile, by the thread that waits.
    """
    for ending in endings:
        while not _ends(ending):
            beat()
    return [ending.result() for ending in endings]


def _ends(ending: "Future[T]") -> bool:
    try:
        ending.exception(BEAT_S)
    except TimeoutError:
        return ending.done()
    return True


def with_beats(call: Callable[[], T], beat: Callable[[], object]) -> T:
    """What a call returns or raises, made in another thread, so that this one can beat."""
    chain = Chain("call")
    ending = chain.submit(call)
    chain.close()
    return ended([ending], beat)[0]


@dataclass
class Outgoing:
    """One push under way, from its first shard to its last receipt."""

    sequence: int
    pulled_versions: Sequence[int]
    num_samples: int
    mailbox: Mailbox
    endings: dict[int, "Future[Receipt]"] = field(default_factory=dict)
    """By shard."""

    @property
    def settled(self) -> bool:
        """Whether `receipts` returns at once."""
        return all(ending.done() for ending in self.endings.values())

    def receipts(self, beat: Callable[[], object]) -> list[Receipt]:
        """Each shard's, once all are there; see `ended`. Raises ShardUnavailable."""
        return ended([self.endings[shard] for shard in sorted(self.endings)], beat)


class Exchange:
    """Starts calls to the shards. To one shard they are made in the order in which they started."""

    def __init__(
        self, worker: int, incarnation: int, client: ParameterClient, vectors: HostVectors
    ) -> None:
        self._worker, self._incarnation = worker, incarnation
        self._client, self._vectors = client, vectors
        self.layout = client.layout
        self.pulled: list[Pulled | None] = [None] * len(self.layout.shards)
        """By shard, what the host's vectors hold; None while they are written to."""
        self._chains = [Chain(f"exchange-{shard}") for shard in range(len(self.layout.shards))]

    @property
    def lanes(self) -> list[LaneName]:
        """The lane that each shard is reached by now."""
        return [shard.lane for shard in self._client.shards]

    @property
    def num_shards(self) -> int:
        return len(self._chains)

    def start_pull(self, at_least: Sequence[int] | None, free: Wait) -> list["Future[Pulled]"]:
        """Pull each shard's newest version, or the first from `at_least` on; returns which.

        free: returns once the host's vectors may be overwritten.
        """
        vectors = self._vectors

        def pull(shard: int) -> Pulled:
            ranges = self.layout.shards[shard]
            free()
            pulled = self._client.shards[shard].pull(
                vectors.parameters[ranges.parameters.slice()],
                vectors.statistics[ranges.statistics.slice()],
                at_least[shard] if at_least else 0,
                self._worker,
                lambda: self._forget(shard),
            )
            self.pulled[shard] = pulled
            return pulled

        return [
            chain.submit(lambda shard=shard: pull(shard))  # type: ignore[misc]
            for shard, chain in enumerate(self._chains)
        ]

    def _forget(self, shard: int) -> None:
        self.pulled[shard] = None

    def start_push(self, outgoing: Outgoing, shard: int) -> None:
        """Push a shard its part of the mailbox, which must be complete on the device."""
        ranges = self.layout.shards[shard]
        arrived = self._vectors.to_host(ranges)
        push = Push(
            self._worker,
            self._incarnation,
            outgoing.sequence,
            outgoing.pulled_versions[shard],
            outgoing.num_samples,
            outgoing.mailbox.gradients[ranges.parameters.slice()],
            outgoing.mailbox.statistics_delta[ranges.statistics.slice()],
        )

        def send() -> Receipt:
            arrived()
            return self._client.shards[shard].push(push)

        outgoing.endings[shard] = self._chains[shard].submit(send)

    def start_rest(self, outgoing: Outgoing) -> None:
        """Push to all shards that haven't got their part yet."""
        for shard in range(self.num_shards):
            if shard not in outgoing.endings:
                self.start_push(outgoing, shard)

    def close(self) -> None:
        """End the threads, once the calls under way have ended."""
        for chain in self._chains:
            chain.close()
