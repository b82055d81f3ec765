"""What people ask of a run that goes on: another number of workers, or of servers.

An order comes from another process by a call to a detached run's driver, or by a file in the run's
folder, which the driver answers by another file.
"""

import json
import logging
import os
import queue
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from model.errors import InputError

_log = logging.getLogger(__name__)

REQUEST_FILE, ANSWER_FILE = ".scale-request.json", ".scale-answer.json"

_NO_ORDER = (ValueError, TypeError, KeyError, OverflowError, RecursionError)
"""What a file holds that is none: no JSON, another value, a number without end, endless lists."""

PATIENCE_S = 5.0
"""So long an order may take until its answer says what is still pending."""


@dataclass(frozen=True)
class Order:
    """One of the two is to be so many from now on."""

    num_workers: int | None = None
    num_servers: int | None = None

    def __post_init__(self) -> None:
        if (self.num_workers is None) == (self.num_servers is None):
            given = "neither is" if self.num_workers is None else "both are"
            raise InputError(
                f"--num-workers and --num-servers: {given} given, and an order is of one of the "
                "two; give the other in an order of its own"
            )

    @property
    def setting(self) -> str:
        """As an option of `train`, which a run that has ended goes on with."""
        if self.num_servers is not None:
            return f"--scaling.num_servers {self.num_servers}"
        return f"--scaling.num_workers {self.num_workers}"


class Scalable(Protocol):
    """What has workers and servers."""

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing more to wait for."""

    @property
    def pending(self) -> str:
        """How many there are, and what is waited for."""

    def scale(self, order: Order) -> None:
        """Want so many. Raises InputError."""


class Orders:
    """Orders for a run, from any thread, carried out by the one that drives it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._given: queue.SimpleQueue[tuple[Order, Future[str]]] = queue.SimpleQueue()
        self._under_way: list[tuple[float, Future[str]]] = []

    def give(self, order: Order) -> "Future[str]":
        """Ask for it; what becomes of it, in words, or InputError."""
        answer: Future[str] = Future()
        self._given.put((order, answer))
        return answer

    def carry_out(self, run: Scalable, folder: Path) -> None:
        """Do what was asked since, also in the run's folder. To be called often."""
        self._read(folder)
        while not self._given.empty():
            order, answer = self._given.get()
            try:
                run.scale(order)
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
            request_id, order = str(request["id"]), _order_in(request)
        except _NO_ORDER as error:  # no run ends for a file like that
            _log.warning("%s held no order: %r", path, error)
            return
        answer = self.give(order)
        answer.add_done_callback(lambda done: _write_answer(folder, request_id, done))


def forget_requests(folder: Path) -> None:
    """Whatever was asked of an earlier driver."""
    (folder / REQUEST_FILE).unlink(missing_ok=True)


def _order_in(request: Mapping[str, Any]) -> Order:
    """Raises what `_NO_ORDER` names."""
    named = [field.name for field in fields(Order) if request.get(field.name) is not None]
    return Order(**{name: int(request[name]) for name in named})


def write_request(folder: Path, request_id: str, order: Order) -> None:
    """Ask the driver of the run in this folder. Raises OSError."""
    _write_json(folder / REQUEST_FILE, {"id": request_id, **asdict(order)})


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
