"""A run with a fixed number of places that was scaled down, and begins again with a new session."""

from types import SimpleNamespace
from unittest import mock

import pytest
from test_node_workers import Coordinator, Ray

from asynception.plan import plan_model
from asynception.recipe import validate
from asynception.supervisor import Supervisor
from asynception.worker_room import SharedRoom
from ps.schedule import Horizon

NUM_WORKERS = 4


@pytest.fixture
def supervisor(monkeypatch):
    """Of a new session, whose room knows what was wanted before."""
    ray = Ray()
    for module in ("supervisor", "places"):
        monkeypatch.setattr(f"asynception.{module}.ray", ray)
    monkeypatch.setattr("asynception.supervisor.WorkerActor", ray)
    config = validate(
        {
            "data": {"train": "t", "val": "v", "image_size": 32},
            "model": {"width": 0.05},
            "training": {"epochs": 1},
            "scaling": {"num_workers": NUM_WORKERS},
        }
    )
    plan = SimpleNamespace(
        config=config,
        model=plan_model(config, num_classes=3),
        train=SimpleNamespace(num_samples=1000, num_classes=3),
        horizon=Horizon(epoch_samples=1000, num_workers=NUM_WORKERS),
    )
    group = SimpleNamespace(bundle_count=NUM_WORKERS)
    room = SimpleNamespace(
        for_worker=lambda worker: {},
        worker_nodes=lambda: dict.fromkeys(range(NUM_WORKERS), "node"),
        worker_resources={},
        workers=SharedRoom(group, NUM_WORKERS, {}),
        draining_nodes=tuple,
    )
    return lambda wanted: (
        room.workers.want(wanted)
        or Supervisor(plan, room, Coordinator(), mock.Mock(), None, mock.Mock())
    )


@pytest.mark.parametrize("left", [{0, 1}, {0, 3}, {2, 3}, {3}])
def test_whoever_was_left_the_workers_of_the_new_session_are_the_wanted_ones(supervisor, left):
    made = supervisor(frozenset(left))
    made.start_due(0)
    assert len(made.lives) == len(left)
    assert set(made.lives) == set(made._room.workers.wanted)
    assert made.staff.described == f"{len(left)} of {len(left)} workers"
