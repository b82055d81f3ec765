"""Elastic averaging against plain float64, and what it conserves; the loop that exchanges."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_shards import LocalClient, RecordingClient
from policy_shards import NUM_PARAMETERS, NUM_STATISTICS, Task, parameters_of, push_of, shard_of
from test_local_steps import (
    HORIZON,
    LR,
    NUM_WORKERS,
    OBJECTIVE,
    batch_of,
    tiny_model,
    train_alone,
)

from asynception.recipe import validate
from model.errors import InputError
from model.flat import FlatModule, Segment
from ps.consistency import Elastic
from ps.rules import SGD, Ema, Momentum
from ps.schedule import Clocks, Constant
from ps.shard import Outcome, ShardConfig
from worker.elastic_steps import ElasticSteps
from worker.gradient import GradientComputer, GradientSummary
from worker.loop import WorkerLoop

ALPHA, TAU = 0.3, 3


class Flat:
    """The vectors of a model, in float64."""

    def __init__(self, shard):
        state = shard.capture()
        self.parameters = state.vectors["parameters"].clone()
        self.statistics = state.vectors["statistics"].clone()
        self.gradients = torch.zeros_like(self.parameters)
        self.parameter_segments = (Segment("w", (NUM_PARAMETERS,), 0, False),)
        self.statistic_segments = (Segment("s", (NUM_STATISTICS,), 0, False),)


class Computer:
    """Gradients of a task; statistics follow what a batch holds."""

    def __init__(self, task, flat):
        self.task, self.flat = task, flat
        self.statistics_delta = torch.zeros_like(flat.statistics)

    def compute(self, batch):
        self.flat.gradients.copy_(self.task.gradient(self.flat.parameters, batch.indices))
        move(self.flat.statistics, batch)
        return GradientSummary(1.0, 1.0)


def move(statistics, batch):
    statistics.lerp_(batch.indices.double().mean().expand(NUM_STATISTICS), 0.1)


class Worker:
    """A life that pulls from one shard and pushes to it."""

    def __init__(self, number, shard, task, rule, incarnation=0):
        self.number, self.shard, self.incarnation = number, shard, incarnation
        self.flat, self.sequence, self.push = Flat(shard), 0, None
        computer = Computer(task, self.flat)
        self.local = ElasticSteps(computer, rule, Constant(lr=LR), HORIZON, Clocks(), ALPHA)
        self.delta = computer.statistics_delta

    def train(self, batches):
        self.local.begin()
        for batch in batches:
            self.local.add(batch)

    def pull(self):
        self.local.set_aside()
        state = self.shard.capture()
        self.flat.parameters.copy_(state.vectors["parameters"])
        self.flat.statistics.copy_(state.vectors["statistics"])
        self.local.finish()
        vectors = (self.flat.gradients, 4, self.incarnation, self.delta)
        self.push = push_of(self.number, self.sequence, state.clocks.updates, *vectors)
        self.sequence += 1

    def send(self):
        """Also again: at a shard, pushes use their vectors up."""
        vectors = (self.push.gradient, 4, self.push.incarnation, self.push.statistics_delta)
        again = push_of(self.number, self.push.sequence, self.push.pulled_version, *vectors)
        return self.shard.push(again)


class Reference:
    """Algorithm 1 of the paper, or EAMSGD's with a momentum, by torch's own optimizer."""

    def __init__(self, workers, start, task, momentum):
        self.task, self.centre = task, (start[0].clone(), start[1].clone())
        self.own = [torch.nn.Parameter(start[0].clone()) for _ in range(workers)]
        self.statistics = [start[1].clone() for _ in range(workers)]
        self.optimizers = [torch.optim.SGD([x], lr=LR, momentum=momentum) for x in self.own]

    def train(self, worker, batches):
        for batch in batches:
            self.own[worker].grad = self.task.gradient(self.own[worker].data, batch.indices)
            self.optimizers[worker].step()
            move(self.statistics[worker], batch)

    def meet(self, workers):
        """All of them compute their e from the centre as it is, and it moves by their sum."""
        before = [vector.clone() for vector in self.centre]
        for worker in workers:
            for mine, old, centre in zip(
                (self.own[worker].data, self.statistics[worker]), before, self.centre, strict=True
            ):
                e = ALPHA * (mine - old)
                mine -= e
                centre += e


def batches_of(task, count):
    return [
        SimpleNamespace(indices=task.batch(4), labels=SimpleNamespace(num_images=4))
        for _ in range(count)
    ]


def start_of(shard):
    state = shard.capture()
    return state.vectors["parameters"], state.vectors["statistics"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "rounds",
    [
        [[0]] * 20,
        [[0], [1], [2]] * 7,
        [[2], [0, 1], [1, 2], [0], [2, 1, 0]] * 4,
    ],
    ids=["one worker", "in turn", "some at one time"],
)
def test_it_is_the_papers_algorithm_in_float64(rounds, momentum):
    num_workers, task = 1 + max(map(max, rounds)), Task(3)
    shard = shard_of(Elastic(local_steps=TAU, moving_rate=ALPHA), num_workers)
    reference = Reference(num_workers, start_of(shard), task, momentum)
    rule = Momentum(momentum=momentum) if momentum else SGD()
    workers = [Worker(number, shard, task, rule) for number in range(num_workers)]
    for together in rounds:
        for number in together:
            batches = batches_of(task, TAU)
            workers[number].train(batches)
            reference.train(number, batches)
        for number in together:
            workers[number].pull()
        for number in reversed(together):
            assert workers[number].send().outcome is Outcome.APPLIED
        reference.meet(together)
    pairs = [(start_of(shard), reference.centre)]
    for worker, x, statistics in zip(workers, reference.own, reference.statistics, strict=True):
        pairs.append(((worker.flat.parameters, worker.flat.statistics), (x.data, statistics)))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (parameters_of(shard) - torch.linspace(-1, 1, 24)).abs().max() > 0.01


@given(st.data())
@settings(deadline=None)
def test_what_leaves_a_worker_arrives_in_the_centre_once(data):
    """Any order of pulls and pushes, pushes that come again, and deaths at any time."""
    num_workers, task = data.draw(st.integers(1, 3)), Task(1)
    shard = shard_of(Elastic(moving_rate=ALPHA), num_workers)
    workers = [Worker(number, shard, task, SGD()) for number in range(num_workers)]
    total = (1 + num_workers) * parameters_of(shard)
    under_way = set()
    for _ in range(data.draw(st.integers(0, 40))):
        number = data.draw(st.integers(0, num_workers - 1))
        worker = workers[number]
        what = data.draw(st.sampled_from(["train", "train", "pull", "send", "send", "die"]))
        if what == "die":
            lost, is_lost = worker.flat.parameters, number in under_way
            if is_lost:  # it has left the worker, and never arrives
                total += worker.push.gradient
            under_way.discard(number)
            shard.fence(number, worker.incarnation + 1)
            workers[number] = Worker(number, shard, task, SGD(), worker.incarnation + 1)
            total += parameters_of(shard) - lost
            assert is_lost is False or worker.send().outcome is Outcome.FENCED
        elif what == "send" and worker.push is not None:
            assert worker.send().outcome is Outcome.APPLIED
            under_way.discard(number)
        elif what == "train" and number not in under_way:
            before = worker.flat.parameters.clone()
            worker.train(batches_of(task, 1))
            total += worker.flat.parameters - before
        elif what == "pull" and worker.local.has_begun and number not in under_way:
            worker.local._steps = worker.local._steps or [(1, GradientSummary(1.0, 1.0))]
            worker.pull()
            under_way.add(number)
    found = parameters_of(shard) + sum(worker.flat.parameters for worker in workers)
    # What is under way has left its worker: in a push it has the other sign.
    found -= sum((workers[number].push.gradient for number in under_way), torch.zeros(24))
    torch.testing.assert_close(found, total, rtol=0, atol=1e-9)


def test_who_has_lost_its_way_begins_again_at_the_centre():
    task, shard = Task(2), shard_of(Elastic(moving_rate=ALPHA), 1)
    worker = Worker(0, shard, task, Momentum())
    worker.train(batches_of(task, 2))
    worker.flat.parameters[3] = torch.nan
    worker.pull()
    assert worker.send().outcome is Outcome.NOT_FINITE
    torch.testing.assert_close((worker.flat.parameters, worker.flat.statistics), start_of(shard))
    assert all((slot == 0).all() for slot in worker.local._slots)


def test_where_workers_come_and_go_the_schedule_follows_what_all_have_pushed():
    """First this one is alone, then there are three others, then none but it again."""
    flat = FlatModule(tiny_model())
    computer, start = GradientComputer(flat, OBJECTIVE, None), Clocks(5, 1000)
    given = (computer, SGD(), Constant(lr=LR), HORIZON, start, ALPHA)
    counting, fixed = ElasticSteps(*given, counts_pushes=True), ElasticSteps(*given)
    found = []
    counting.meet(7)
    for version in (7, 8, 9, 13, 17, 18):
        counting.begin()
        for number in (0, 3):
            counting.add(batch_of(number))
        counting.meet(version)
        found.append(counting._clocks.samples - start.samples)
    own = sum(batch_of(number).labels.num_images for number in (0, 3))
    assert found == [own * (version - 7 + 1) for version in (7, 8, 9, 13, 17, 18)]
    assert counting._clocks.updates == start.updates + 12, "its own steps"
    before = counting._clocks.samples
    counting.begin()
    counting.add(batch_of(0))
    assert counting._clocks.samples - before == batch_of(0).labels.num_images, "as it was last"
    fixed.begin()
    fixed.add(batch_of(0))
    fixed.meet(99)
    assert fixed._clocks.samples - start.samples == 3 * NUM_WORKERS


def loop_of(flat, client):
    computer = GradientComputer(flat, OBJECTIVE, None)
    local = ElasticSteps(computer, SGD(), Constant(lr=LR), HORIZON, Clocks(), ALPHA)
    return WorkerLoop(0, 0, computer, client, local=local, batches_per_push=2)


def test_a_worker_pulls_before_its_first_step_and_before_each_push():
    flat = FlatModule(tiny_model())
    client = RecordingClient(flat, 2)
    loop = loop_of(flat, client)
    loop.run([batch_of(n) for n in (0, 3, 6, 9, 12)], lambda report: None)
    for number, shard in enumerate(client.shards):
        assert shard.calls == ["pull", *(["pull", "push"] * 3)]
        assert [push.pulled_version for push in shard.pushes] == [number] * 3
        assert loop.holdings.version(number) is None, "what the model has is the worker's own"


def test_a_loop_is_pytorch_and_a_centre():
    flat, module = FlatModule(tiny_model()), tiny_model().train()
    own = FlatModule(module)
    config = lambda ranges: ShardConfig(  # noqa: E731
        ranges, SGD(), Constant(lr=9.0), HORIZON, Ema(decay=0.5), Elastic(moving_rate=ALPHA)
    )
    client = LocalClient(flat, 2, config)
    centre = (own.parameters.clone(), own.statistics.clone())
    batches = [batch_of(n) for n in (0, 3, 6, 9, 12, 15)]
    loop_of(flat, client).run(batches, lambda report: None)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    for first in range(0, len(batches), 2):
        train_alone(module, optimizer, batches[first : first + 2], [LR, LR])
        with torch.no_grad():
            for mine, common in zip((own.parameters, own.statistics), centre, strict=True):
                e = ALPHA * (mine - common)
                mine -= e
                common += e
    torch.testing.assert_close(client.held(), centre, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flat.parameters, own.parameters, rtol=1e-5, atol=1e-6)


TREE = {
    "data": {"train": "/a", "val": "/b"},
    "training": {"epochs": 1},
    "scaling": {"num_workers": 4},
}


def test_a_centre_that_would_swing_is_refused():
    policy = validate(TREE | {"consistency": {"mode": "elastic"}}).consistency
    assert policy.rate(4) == 0.225
    for rate in (0.25, 0.9):
        given_rate = {"mode": "elastic", "moving_rate": rate}
        with pytest.raises(InputError, match=r"moving_rate = .*num_workers = 4: .* than 0.25"):
            validate(TREE | {"consistency": given_rate})
    assert validate(TREE | {"consistency": {"mode": "elastic", "moving_rate": 0.24}}).trains_locally
    assert NUM_WORKERS * ALPHA < 1
