"""Who is killed for having said nothing for too long."""

from types import SimpleNamespace

import pytest

from asynception import supervisor as supervisor_module
from asynception.places import Places
from asynception.supervisor import Supervisor

LIMIT_S = 5.0


@pytest.fixture
def watched(monkeypatch):
    """Workers 0 and 1 at work; `ended` takes the endings of those that are not any more."""
    watched = SimpleNamespace(ended=set(), killed=[], told=[])
    monkeypatch.setattr(
        supervisor_module,
        "ray",
        SimpleNamespace(
            wait=lambda endings, timeout: ([e for e in endings if e in watched.ended], []),
            kill=watched.killed.append,
        ),
    )
    supervisor = object.__new__(Supervisor)
    config = SimpleNamespace(
        failure=SimpleNamespace(worker_timeout_s=LIMIT_S),
        run=SimpleNamespace(placement_timeout_s=60.0),
    )
    supervisor._plan = SimpleNamespace(config=config)
    supervisor._reporter = SimpleNamespace(event=watched.told.append)
    supervisor._places = Places(room=None)
    supervisor.staff = SimpleNamespace(heed_notices=lambda: None)
    supervisor._actors = {0: "actor 0", 1: "actor 1"}
    supervisor._running = {"end 0": 0, "end 1": 1}
    watched.look_after = supervisor.look_after
    return watched


def test_a_worker_that_is_silent_for_too_long_is_killed(watched):
    watched.look_after({0: LIMIT_S + 1, 1: LIMIT_S - 1})
    assert watched.killed == ["actor 0"]
    assert watched.told == ["worker 0 was silent for 6 s; killing it"]


def test_a_worker_that_has_ended_is_not_silent(watched):
    """Its end may not have been dealt with for long, as while servers are asked about another."""
    watched.ended = {"end 0"}
    watched.look_after({0: LIMIT_S + 1, 1: LIMIT_S + 1})
    assert watched.killed == ["actor 1"]


def test_one_that_is_counted_and_has_no_process_can_not_be_killed(watched):
    watched.look_after({2: LIMIT_S + 1})
    assert not watched.killed
    assert not watched.told
