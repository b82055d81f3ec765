"""Calls in other threads, and waiting for what they bring about, with a deadline."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

DEADLINE_S = 60.0
"""For what takes moments, on a machine that may do much else."""


def background(call: Callable[[], object]) -> Future:
    """`call` in a daemon thread, so that a test that fails doesn't wait for it."""
    future: Future = Future()

    def run():
        try:
            future.set_result(call())
        except BaseException as error:  # handed on by the future
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def eventually(condition: Callable[[], object]) -> None:
    """Wait for a condition that another thread or process brings about."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.001)
