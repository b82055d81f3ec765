"""A function over many tasks in several processes, with no more in memory than is under way."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait as wait_for_end
from typing import TypeVar

from model.errors import InputError

T = TypeVar("T")
R = TypeVar("R")


def map_unordered(function: Callable[[T], R], tasks: Iterable[T], num_workers: int) -> Iterator[R]:
    """The results as they are ready, in this process if num_workers is 1.

    function: of a module's top level. Raises what it raises, after the tasks under way have
    ended, and InputError when a process was killed.
    """
    if num_workers == 1:
        yield from map(function, tasks)
        return
    # A server that is forked has imported everything once, and no threads that a fork would lose.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    pool = ProcessPoolExecutor(num_workers, context, _initialize)
    try:
        yield from _results(pool, function, iter(tasks), 2 * num_workers)
    except BrokenProcessPool:
        raise InputError(
            f"--num-workers={num_workers}: a process was killed, perhaps for its memory: start "
            "again with fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _results(
    pool: ProcessPoolExecutor, function: Callable[[T], R], tasks: Iterator[T], limit: int
) -> Iterator[R]:
    running: set[Future[R]] = set()
    while True:
        running |= {pool.submit(function, task) for task in islice(tasks, limit - len(running))}
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _initialize() -> None:
    """Ctrl-C is the parent's to handle, and a worker must not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for_end([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
