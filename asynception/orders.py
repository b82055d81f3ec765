"""What people ask of a run that goes on: another number of workers.

An order comes from another process by a call to a detached run's driver, or by a file in the run's
folder, which the driver answers by another file.
"""

import json
import logging
import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from model.errors import InputError

_log = logging.getLogger(__name__)

REQUEST_FILE, ANSWER_FILE = ".scale-request.json", ".scale-answer.json"

_NO_ORDER = (ValueError, TypeError, KeyError, OverflowError, RecursionError)
"""What a file holds that is none: no JSON, another value, a number without end, endless lists."""

PATIENCE_S = 5.0
"""So long an order may take until its answer says what is still pending."""


class Scalable(Protocol):
    """What has workers."""

    @property
    def is_complete(self) -> bool:
        """Whether all workers that are wanted are there, and no others."""

    @property
    def pending(self) -> str:
        """How many workers there are, and what is waited for."""

    def scale(self, num_workers: int) -> None:
        """Want so many. Raises InputError."""


class Orders:
    """Orders for a run, from any thread, carried out by the one that drives it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._given: queue.SimpleQueue[tuple[int, Future[str]]] = queue.SimpleQueue()
        self._under_way: list[tuple[float, Future[str]]] = []

    def give(self, num_workers: int) -> "Future[str]":
        """Ask for so many workers; what becomes of it, in words, or InputError."""
        answer: Future[str] = Future()
        self._given.put((num_workers, answer))
        return answer

    def carry_out(self, run: Scalable, folder: Path) -> None:
        """Do what was asked since, also in the run's folder. To be called often."""
        self._read(folder)
        while not self._given.empty():
            num_workers, answer = self._given.get()
            try:
                run.scale(num_workers)
            except InputError as error:
                answer.set_exception(error)
            else:
                self._under_way.append((self._clock() + PATIENCE_S, answer))
        self._answer(run)

    def _answer(self, run: Scalable) -> None:
        waiting = []
        for end_s, answer in self._under_way:
            if run.is_complete or self._clock() >= end_s:
                answer.set_result(run.pending)
            else:
                waiting.append((end_s, answer))
        self._under_way = waiting

    def _read(self, folder: Path) -> None:
        """Take the order that lies in the folder, if there is one."""
        path = folder / REQUEST_FILE
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return
        path.unlink(missing_ok=True)
        try:
            request = json.loads(text)
            request_id, num_workers = str(request["id"]), int(request["num_workers"])
        except _NO_ORDER as error:  # no run ends for a file like that
            _log.warning("%s held no order: %r", path, error)
            return
        answer = self.give(num_workers)
        answer.add_done_callback(lambda done: _write_answer(folder, request_id, done))


def forget_requests(folder: Path) -> None:
    """Whatever was asked of an earlier driver."""
    (folder / REQUEST_FILE).unlink(missing_ok=True)


def write_request(folder: Path, request_id: str, num_workers: int) -> None:
    """Ask the driver of the run in this folder. Raises OSError."""
    _write_json(folder / REQUEST_FILE, {"id": request_id, "num_workers": num_workers})


def withdraw_request(folder: Path) -> bool:
    """Take the order back; False if somebody has taken it on."""
    try:
        (folder / REQUEST_FILE).unlink()
    except FileNotFoundError:
        return False
    return True


def read_answer(folder: Path, request_id: str) -> str | None:
    """What became of an order, once that is known. Raises InputError if it was refused."""
    answer = _read_json(folder / ANSWER_FILE)
    if answer is None or answer["id"] != request_id:
        return None
    if answer["refused"]:
        raise InputError(answer["text"])
    return str(answer["text"])


def _write_answer(folder: Path, request_id: str, done: "Future[str]") -> None:
    error = done.exception()
    text = done.result() if error is None else str(error)
    _write_json(folder / ANSWER_FILE, {"id": request_id, "refused": bool(error), "text": text})


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    incomplete = path.with_name(f"{path.name}.incomplete")
    incomplete.write_text(json.dumps(values))
    os.replace(incomplete, path)
