"""Threads, futures and conditions with the interfaces of the real ones, in virtual time."""

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from asynception.simulate.world import Signal, current

T = TypeVar("T")


class Future(Generic[T]):
    """As `concurrent.futures.Future`."""

    def __init__(self) -> None:
        self.ended = Signal(current())
        self._value: T | None = None
        self._error: Exception | None = None

    def done(self) -> bool:
        return self.ended.is_set

    def result(self) -> T:
        self.ended.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def exception(self, timeout: float | None = None) -> Exception | None:
        if not self.ended.wait(timeout):
            raise TimeoutError
        return self._error

    def run(self, call: Callable[[], T]) -> None:
        """End with what `call` returns or raises."""
        try:
            self._value = call()
        except Exception as error:  # it is the waiting thread's to handle
            self._error = error
        self.ended.set()


class Executor:
    """As `concurrent.futures.ThreadPoolExecutor`; threads belong to the party that submits."""

    def __init__(self, max_workers: int = 1, thread_name_prefix: str = "") -> None:
        self._free = max_workers
        self._waiting: deque[Callable[[], None]] = deque()
        self._last: Future[Any] | None = None

    def submit(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        ending: Future[T] = Future()
        self._waiting.append(lambda: ending.run(lambda: call(*arguments)))
        if self._free:
            self._free -= 1
            world = current()
            world.spawn(world.party, self._work)
        self._last = ending
        return ending

    def _work(self) -> None:
        while self._waiting:
            self._waiting.popleft()()
        self._free += 1

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        if cancel_futures:
            self._waiting.clear()
        if wait and self._last is not None and not cancel_futures:
            self._last.exception()


class Chain:
    """As `worker.exchange.Chain`: one call after another."""

    def __init__(self, name: str) -> None:
        self._executor = Executor(1, name)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        return self._executor.submit(call)

    def close(self) -> None:
        """Nothing more will be submitted."""


class Condition:
    """As `threading.Condition` around a lock that nobody holds while he waits."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._waiting: list[Signal] = []

    def __enter__(self) -> bool:
        return self._lock.acquire(timeout=10)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()

    def wait_for(self, predicate: Callable[[], bool], timeout: float) -> bool:
        world = current()
        deadline_s = world.now_s + timeout
        while not predicate():
            left_s = deadline_s - world.now_s
            if left_s <= 0:
                return predicate()
            signal = Signal(world)
            self._waiting.append(signal)
            self._lock.release()
            try:
                signal.wait(left_s)
            finally:
                self._lock.acquire()
        return True

    def notify_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        for signal in waiting:
            signal.set()
