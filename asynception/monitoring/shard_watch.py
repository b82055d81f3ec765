"""Asks the shards how they are, now and then, without holding the run up."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import grpc

from asynception.monitoring.measured import Reading
from ps.client import ShardUnavailable
from ps.messages import ShardStatus
from worker.exchange import Chain

LAST_TIMEOUT_S = 5.0
"""How long the end of a run waits for the shards' last answer."""


class Shards(Protocol):
    """All shards, as a ParameterClient has them."""

    def describe(self) -> Sequence[ShardStatus]:
        """Clocks and counters of each. Raises ShardUnavailable."""


class ShardWatch:
    """One question at a time, in a thread; a shard that doesn't answer is others' business."""

    def __init__(self) -> None:
        self._shards: Shards | None = None
        self._thread: Chain | None = None
        self._asked: tuple[float, Future[Sequence[ShardStatus]]] | None = None
        self.reading = Reading(0.0, ())
        """The last answer; empty while there is none of these shards."""

    def attend(self, shards: Shards | None) -> None:
        """Ask these from now on, and forget what others said; None for nobody any more."""
        if self._thread is not None:
            self._thread.close()
        self._shards, self._asked, self._thread = shards, None, None
        if shards is not None:
            self._thread = Chain("shard-watch")
            self.reading = Reading(0.0, ())

    def ask(self, time_s: float, *, wait: bool = False) -> None:
        """Take the answer that has come, and ask anew; with `wait`, be answered first."""
        self._take(LAST_TIMEOUT_S if wait else 0.0)
        if self._shards is None or self._thread is None:
            return
        if self._asked is None:
            self._asked = (time_s, self._thread.submit(self._shards.describe))
        if wait:
            self._take(LAST_TIMEOUT_S)

    def _take(self, timeout_s: float = 0.0) -> None:
        if self._asked is None:
            return
        asked_s, answer = self._asked
        try:
            self.reading = Reading(asked_s, answer.result(timeout_s))
        except TimeoutError:
            return
        except (ShardUnavailable, grpc.RpcError):
            pass
        self._asked = None
