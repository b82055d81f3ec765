"""Workers' places: which of them have a process, and for which there is no room."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from asynception.cluster import Room


class Places:
    """Workers that were started and have not been heard of by Ray yet, and those that lack room.

    When a node dies, Ray seeks room on the others for what was reserved there, and for as long as
    there is none an actor is neither dead nor alive. It begins by itself when there is.
    """

    def __init__(self, room: Room) -> None:
        self._room, self._clock = room, time.monotonic
        self._arrivals: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._lacking_since_s: dict[int, float] = {}
        self._arrived_s: dict[int, float] = {}
        self._deserted_since_s: float | None = None

    def begin(self, worker: int, arrival: Any) -> None:
        """A worker's actor was created. `arrival`: Ray's reference, ready when it is there."""
        self._arrivals[worker] = arrival

    def end(self, worker: int) -> None:
        """The actor in this place is gone."""
        self._arrivals.pop(worker, None)

    def lost_its_node(self, worker: int) -> bool:
        """Whether a place is on another node than when its last worker began, or on none."""
        if worker not in self._nodes:
            return False
        return self._nodes[worker] != self._room.worker_nodes().get(worker, "")

    def has_node(self, worker: int) -> bool:
        """Whether a worker that lacks room has a node all the same, which doesn't start it."""
        return bool(self._nodes.get(worker))

    @property
    def lacking(self) -> set[int]:
        """Workers that have no room, as far as has been noticed."""
        return set(self._lacking_since_s)

    @property
    def absent(self) -> set[int]:
        """Workers that have no process yet, as far as has been noticed."""
        return {*self._arrivals, *self._lacking_since_s}

    def silence_s(self, worker: int, silent_s: float) -> float:
        """Of the seconds for which a worker was not heard of, those for which it was there."""
        if worker in self._arrivals:
            return 0.0
        return min(silent_s, self._clock() - self._arrived_s.get(worker, -math.inf))

    def newly_arrived(self) -> Iterator[int]:
        """Workers that had no room and now have a process; to be called often."""
        for worker, arrival in list(self._arrivals.items()):
            if not ray.wait([arrival], timeout=0)[0]:
                continue
            del self._arrivals[worker]
            self._arrived_s[worker] = self._clock()
            if worker in self._lacking_since_s and _succeeded(arrival):
                del self._lacking_since_s[worker]
                yield worker

    def newly_lacking(self, silent_s: Mapping[int, float], start_timeout_s: float) -> list[int]:
        """Workers that have no node, or haven't begun on theirs in time."""
        waiting = [worker for worker in self._arrivals if worker not in self._lacking_since_s]
        if not waiting:
            return []
        nodes = self._room.worker_nodes()
        self._nodes.update({worker: nodes.get(worker, "") for worker in waiting})
        new = [w for w in waiting if not self._nodes[w] or silent_s.get(w, 0.0) > start_timeout_s]
        self._lacking_since_s.update(dict.fromkeys(new, self._clock()))
        return new

    def lacking_s(self) -> float:
        """Seconds since the last place was found to have no room; 0 if all have."""
        since_s = self._lacking_since_s.values()
        return self._clock() - max(since_s) if since_s else 0.0

    def deserted_s(self, is_deserted: bool) -> float:
        """Seconds for which nobody has been in any place; to be told often."""
        if not is_deserted:
            self._deserted_since_s = None
        elif self._deserted_since_s is None:
            self._deserted_since_s = self._clock()
        return 0.0 if self._deserted_since_s is None else self._clock() - self._deserted_since_s


def _succeeded(reference: Any) -> bool:
    try:
        ray.get(reference)
    except RayActorError:  # whoever waits for the actor's end deals with it
        return False
    return True
