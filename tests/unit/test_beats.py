"""A worker that waits for servers, or at them for other workers, is heard of meanwhile."""

import threading
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from local_shards import RecordingClient
from torch import nn

from asynception import actors
from model.flat import FlatModule
from worker import exchange
from worker.data.labels import LabelLists
from worker.data.loader import Batch
from worker.exchange import ended, with_beats
from worker.gradient import GradientComputer
from worker.loop import WorkerLoop
from worker.objective import create_objective
from worker.pipeline import PipelineSettings

DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(exchange, "BEAT_S", 0.01)


class Held:
    """Something that takes until two beats have come."""

    def __init__(self):
        self._beats, self._over, self.times = 0, threading.Event(), 0

    def beat(self):
        self._beats += 1
        if self._beats == 2:
            self._over.set()

    def up(self):
        self.times += 1
        assert self._over.wait(DEADLINE_S), "nothing was heard of the worker"


def image():
    return Batch(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), LabelLists.from_lists([[0]]), 0, 1, ())


@pytest.mark.parametrize("settings", [PipelineSettings(), PipelineSettings(overlap=True)])
@pytest.mark.parametrize("call", ["pull", "push"])
def test_a_worker_is_heard_of_while_a_shard_keeps_it_waiting(call, settings):
    flat = FlatModule(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    client, held = RecordingClient(flat, 2), Held()
    at_once = getattr(client.shards[1], call)
    setattr(client.shards[1], call, lambda *arguments: [held.up(), at_once(*arguments)][1])
    computer = GradientComputer(flat, create_objective("multilabel", 4), None)
    reports = []
    loop = WorkerLoop(0, 0, computer, client, pipeline=settings, beat=held.beat)
    loop.run([image(), image()], reports.append)
    assert held.times >= 2
    assert [report.sequence for report in reports] == [0, 1]


def test_a_call_is_waited_for_with_beats_and_its_error_is_the_callers():
    held = Held()
    assert with_beats(lambda: held.up() or 7, held.beat) == 7
    with pytest.raises(ValueError, match="no such thing"):
        with_beats(partial(int, "no such thing"), held.beat)


def test_a_call_that_ends_with_a_timeout_is_waited_for_no_longer():
    """A call's own TimeoutError is not the wait's."""
    ending: Future[None] = Future()
    ending.set_exception(TimeoutError("of the call"))
    with pytest.raises(TimeoutError, match="of the call"):
        ended([ending], lambda: pytest.fail("it has ended"))


class Begun(Exception):
    """The worker has all that it needs to begin."""


def test_a_worker_is_heard_of_while_servers_let_it_wait_at_its_start(monkeypatch):
    waiting = []

    def wait_for_a_report(*_):
        waiting.append(threading.Event())
        assert waiting[-1].wait(DEADLINE_S), "nothing was heard of the worker"

    def begin(leases):
        raise Begun

    calls = {"connect": wait_for_a_report, "enter": wait_for_a_report}
    monkeypatch.setattr(actors, "REPORT_EVERY_S", 0.0)
    monkeypatch.setattr(actors, "ray", SimpleNamespace(get=lambda call, timeout: 0))
    report = SimpleNamespace(remote=lambda *_: [each.set() for each in waiting])
    process = object.__new__(actors.WorkerProcess)
    process._config = SimpleNamespace(
        consistency=SimpleNamespace(max_lead=2), scaling=SimpleNamespace(is_range=True)
    )
    process._moving, process._moves = threading.Lock(), {}
    process._computer, process._batches = (lambda worker: None), begin
    connection = SimpleNamespace(open_lanes=lambda config: SimpleNamespace(**calls))
    with pytest.raises(Begun):
        process.run(0, 0, connection, SimpleNamespace(report=report), None)
    assert len(waiting) == 2
