"""Which actor stands for a worker of several processes, from life to life."""

from types import SimpleNamespace
from unittest import mock

import pytest
from ray.exceptions import ActorDiedError

from asynception.node_workers import NodeSupervisor
from asynception.plan import plan_model
from asynception.recipe import validate
from asynception.totals import Progress, Totals
from ps.receipts import Settled
from ps.schedule import Horizon

NUM_PROCESSES, WORKER = 3, 0


class Call:
    """A call to an actor, or its answer, which is there at once."""

    def __init__(self, name, arguments=(), answer=None):
        self.name, self.arguments, self.answer = name, arguments, answer
        self.error = None
        self.is_ready = name not in ("lead", "follow")


class Actor:
    def __init__(self, options):
        self.options, self.calls, self.killed = options, {}, False

    def __getattr__(self, name):
        def remote(*arguments):
            return self.calls.setdefault(name, Call(name, arguments, "127.0.0.1:1"))

        return SimpleNamespace(remote=remote)


class Coordinator:
    answers = {"has_work": True, "progress": Progress(0, Totals()), "end": 0}  # noqa: RUF012

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *a: Call(name, a, self.answers.get(name)))


class Ray:
    """As much of the module as a supervisor uses."""

    def __init__(self):
        self.actors = []

    def options(self, **options):
        def remote(*_):
            self.actors.append(Actor(options))
            return self.actors[-1]

        return SimpleNamespace(remote=remote)

    def get(self, call):
        if call.error is not None:
            raise call.error
        return call.answer

    def wait(self, calls, num_returns=1, timeout=None):
        ready = [call for call in calls if call.is_ready]
        return ready, [call for call in calls if not call.is_ready]

    def kill(self, actor):
        actor.killed = True


@pytest.fixture
def ray(monkeypatch):
    ray = Ray()
    for module in ("supervisor", "node_workers", "lost_ranks", "places"):
        monkeypatch.setattr(f"asynception.{module}.ray", ray)
    monkeypatch.setattr("asynception.node_workers.NodeWorkerActor", ray)
    return ray


@pytest.fixture
def supervisor(ray):
    config = validate(
        {
            "data": {"train": "t", "val": "v", "image_size": 32},
            "model": {"width": 0.05},
            "training": {"epochs": 1},
            "scaling": {"num_workers": 1, "processes_per_worker": NUM_PROCESSES},
        }
    )
    plan = SimpleNamespace(
        config=config,
        model=plan_model(config, num_classes=3),
        train=SimpleNamespace(num_samples=1000, num_classes=3),
        horizon=Horizon(epoch_samples=1000, num_workers=1),
    )
    room = SimpleNamespace(
        for_worker=lambda worker: {},
        worker_nodes=lambda: {WORKER: "node"},
        worker_resources={},
        workers=SimpleNamespace(comes_and_goes=False, wanted=range(1)),
        draining_nodes=tuple,
    )
    client = mock.Mock(fence=lambda *_: {0: Settled(5, 5)})
    made = NodeSupervisor(plan, room, Coordinator(), client, None, mock.Mock())
    made.start_due(0)
    return made


def lead_and_followers(ray):
    """Of the newest life: the call of its rank 0, and of the others, by actor."""
    living = [actor for actor in ray.actors if not actor.killed]
    (leader,) = (actor for actor in living if "lead" in actor.calls)
    return leader, [actor for actor in living if actor is not leader]


def assert_stands_for_its_worker(supervisor, ray, incarnation):
    leader, followers = lead_and_followers(ray)
    assert len(followers) == NUM_PROCESSES - 1
    assert supervisor.lives == {WORKER: (incarnation, leader)}, "it alone has pulled"
    assert leader.options["max_concurrency"] > 1, "it can be asked while it works"
    assert leader.calls["lead"].arguments[1:3] == (WORKER, incarnation)
    ranks = {follower.calls["follow"].arguments[2] for follower in followers}
    assert ranks == set(range(1, NUM_PROCESSES))
    assert len(supervisor.running) == NUM_PROCESSES


@pytest.mark.parametrize("dies", ["lead", "follow"])
def test_rank_0_is_asked_what_a_worker_holds_in_each_of_its_lives(supervisor, ray, dies):
    for incarnation in range(3):
        assert_stands_for_its_worker(supervisor, ray, incarnation)
        leader, followers = lead_and_followers(ray)
        call = (leader if dies == "lead" else followers[-1]).calls[dies]
        call.is_ready, call.error = True, ActorDiedError()
        supervisor.settle(call)
        assert leader.killed
        assert all(follower.killed for follower in followers)
    assert supervisor.num_deaths == 3
    assert_stands_for_its_worker(supervisor, ray, 3)


def test_a_follower_whose_work_is_done_leaves_its_worker_at_work(supervisor, ray):
    leader, followers = lead_and_followers(ray)
    done = followers[0].calls["follow"]
    done.is_ready = True
    supervisor.settle(done)
    assert supervisor.lives == {WORKER: (0, leader)}
    assert not leader.killed
    assert len(supervisor.running) == NUM_PROCESSES - 1
