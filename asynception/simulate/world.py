"""Virtual time: parties' threads, of which one runs at a time, switched by a seeded scheduler.

A thread gives way only where it waits, in `World.pause`. Everything in between is atomic, as far as
the others can tell, and the same seed makes the same run, to the last switch.
"""

import heapq
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Violation(AssertionError):
    """Something that must always hold did not."""


class NoProgress(Violation):
    """Nobody is left who could go on, or nothing has come to an end in all the time there was."""


class Killed(BaseException):
    """The party that the thread belongs to is dead. No handler of Exception catches it."""


@dataclass(eq=False)
class Party:
    """A process of the run: it lives, may be stopped for a while, and dies as a whole."""

    name: str
    alive: bool = True
    frozen_until_s: float = 0.0
    tasks: list["Task"] = field(default_factory=list)
    at_death: list[Callable[[], None]] = field(default_factory=list)
    """Called once, when it dies."""
    belongings: dict[str, Any] = field(default_factory=dict)
    """What its code looks up by name."""


class Task:
    """One thread's work."""

    def __init__(self, party: Party, body: Callable[[], None]) -> None:
        self.party, self.body = party, body
        self.carrier: _Carrier | None = None
        self.killed = False
        self.token = 0
        """Counts its waits: a wake-up is for one of them."""


class _Carrier:
    """An operating system's thread that carries one task after another."""

    def __init__(self) -> None:
        self.wake = threading.Lock()
        self.wake.acquire()
        self.work: Callable[[], None] | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.wake.acquire()
            work, self.work = self.work, None
            assert work is not None
            work()


_idle: list[_Carrier] = []
"""Shared by all worlds of the process, of which one runs at a time."""


class World:
    """The clock, the queue of what is to come, and the thread that runs now."""

    def __init__(self, seed: int, limit_s: float, max_events: int = 2_000_000) -> None:
        """limit_s: virtual seconds by which `run` must have ended."""
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.trace: list[str] = []
        self._limit_s, self._events_left = limit_s, max_events
        self._queue: list[tuple[float, float, int, Party, Callable[[], None] | Task, int]] = []
        self._number = 0
        self._current: Task | None = None
        self._party = Party("outside")
        self._tasks: list[Task] = []
        self._failure: BaseException | None = None
        self._ending = False
        self._ended = threading.Lock()

    def clock(self) -> float:
        """Seconds since the world began."""
        return self.now_s

    @property
    def party(self) -> Party:
        """Whose code runs now."""
        return self._party

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{self.now_s:.6f} {text}")

    def fail(self, error: BaseException) -> None:
        """End the run with this error, the first one that is given."""
        if self._failure is None:
            self._failure = error
            self.note(f"FAILED {type(error).__name__}: {error}")

    def run(self, party: Party, body: Callable[[], None]) -> None:
        """Have `body` run to its end, then end all other threads. Raises what failed."""

        def root() -> None:
            body()
            self._ending = True

        self._ended.acquire()
        self.spawn(party, root)
        self._advance(None)
        self._ended.acquire()
        self._ending = True
        self._reap()
        if self._failure is not None:
            raise self._failure

    def spawn(self, party: Party, body: Callable[[], None], at_s: float | None = None) -> None:
        """Start a thread of a party, now or later."""
        task = Task(party, body)
        party.tasks.append(task)
        self._tasks.append(task)
        self._push(self.now_s if at_s is None else at_s, party, task, 0)

    def call_at(self, at_s: float, party: Party, call: Callable[[], None]) -> None:
        """Have `call`, which must not wait, made in the name of a party, if it still lives."""
        self._push(at_s, party, call, 0)

    def sleep(self, seconds: float) -> None:
        """Let so much time pass, and others go on."""
        self.pause(seconds)

    def pause(self, timeout_s: float | None = None) -> None:
        """Wait for `wake`, or until the time is over. Raises Killed."""
        task = self._current
        assert task is not None, "a call that must not wait does"
        if self._ending or task.killed:
            raise Killed
        task.token += 1
        if timeout_s is not None:
            self._push(self.now_s + timeout_s, task.party, task, task.token)
        self._advance(task)
        if self._ending or task.killed:
            raise Killed

    def waiting(self) -> tuple[Task, int]:
        """What `wake` needs to end the present thread's next `pause`."""
        task = self._current
        assert task is not None
        return task, task.token + 1

    def wake(self, waiting: tuple[Task, int]) -> None:
        """End a pause, if it goes on."""
        task, token = waiting
        self._push(self.now_s, task.party, task, token)

    def kill(self, party: Party) -> None:
        """The party is dead: none of its threads goes on beyond the wait that it is in."""
        if not party.alive:
            return
        party.alive = False
        self.note(f"{party.name} dies")
        for task in party.tasks:
            task.killed = True
            self._push(self.now_s, party, task, task.token)
        for call in party.at_death:
            call()

    def _push(self, at_s: float, party: Party, what: Callable[[], None] | Task, token: int) -> None:
        self._number += 1
        entry = (at_s, self.random.random(), self._number, party, what, token)
        heapq.heappush(self._queue, entry)

    def _advance(self, waiting: Task | None) -> None:
        """Hand over to whoever is next; return when `waiting` is."""
        following = self._next(waiting)
        if following is not None and following is waiting:
            return
        self._hand_over(following)
        if waiting is not None:
            assert waiting.carrier is not None
            waiting.carrier.wake.acquire()
            self._enter(waiting)

    def _hand_over(self, task: Task | None) -> None:
        if task is None:
            self._ended.release()
            return
        if task.carrier is None:
            task.carrier = _idle.pop() if _idle else _Carrier()
            task.carrier.work = lambda: self._carry(task)
        task.carrier.wake.release()

    def _enter(self, task: Task) -> None:
        self._current, self._party = task, task.party

    def _next(self, waiting: Task | None) -> Task | None:
        """Make the calls that are due until a thread is; None when the run is over."""
        while not self._ending and self._failure is None:
            if not self._queue:
                self.fail(NoProgress("nobody is left who could go on"))
                break
            at_s, _, _, party, what, token = heapq.heappop(self._queue)
            if party.frozen_until_s > at_s and party.alive:
                self._push(party.frozen_until_s, party, what, token)
                continue
            self.now_s = at_s
            self._count()
            if isinstance(what, Task):
                if self._is_due(what, token):
                    if what is waiting:
                        self._enter(what)
                    return what
            elif party.alive:
                self._call(party, what)
        return None

    def _count(self) -> None:
        self._events_left -= 1
        if self.now_s > self._limit_s or self._events_left < 0:
            self.fail(NoProgress(f"not at an end after {self.now_s:.0f} s"))

    @staticmethod
    def _is_due(task: Task, token: int) -> bool:
        if task.carrier is None and task.killed:
            return False
        return token == task.token and task in task.party.tasks

    def _call(self, party: Party, call: Callable[[], None]) -> None:
        self._current, self._party = None, party
        try:
            call()
        except Exception as error:  # it is the run's
            self.fail(error)

    def _carry(self, task: Task) -> None:
        self._enter(task)
        self._perform(task)
        assert task.carrier is not None
        _idle.append(task.carrier)
        if self._ending:
            self._ended.release()
        else:
            self._hand_over(self._next(None))

    def _perform(self, task: Task) -> None:
        try:
            task.body()
        except Killed:
            pass
        except Exception as error:  # it is the run's
            self.fail(error)
        task.party.tasks.remove(task)
        self._tasks.remove(task)

    def _reap(self) -> None:
        """End every thread that still waits, one after the other."""
        while self._tasks:
            task = self._tasks[0]
            if task.carrier is None:
                self._tasks.remove(task)
                continue
            task.carrier.wake.release()
            self._ended.acquire()


class Signal:
    """Something that happens once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.is_set = False
        self._waiting: list[tuple[Task, int]] = []

    def set(self) -> None:
        """It has happened."""
        self.is_set = True
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            self._world.wake(each)

    def watch(self, waiting: tuple[Task, int]) -> None:
        """Wake this one too."""
        self._waiting.append(waiting)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has happened, within the time."""
        deadline_s = None if timeout_s is None else self._world.now_s + timeout_s
        while not self.is_set:
            left_s = None if deadline_s is None else deadline_s - self._world.now_s
            if left_s is not None and left_s <= 0:
                return False
            self._waiting.append(self._world.waiting())
            self._world.pause(left_s)
        return True


_worlds: list[World] = []


def enter(world: World) -> None:
    """Make it the world that `current` returns."""
    _worlds.append(world)


def leave() -> None:
    """Undo `enter`."""
    _worlds.pop()


def current() -> World:
    """The world that runs."""
    return _worlds[-1]
