"""Shards in this process, and clients that reach them by gRPC alone, with pushes of ones."""

import threading
from contextlib import contextmanager
from itertools import count, takewhile

import torch
from lane_cluster import (
    HOST,
    NUM_STATISTICS,
    PATIENT,
    STATISTICS,
    TOKEN,
    WatchedService,
)
from waiting import DEADLINE_S, background

from model.flat import ALIGNMENT, Segment
from ps.client import (
    ModelState,
    ParameterClient,
)
from ps.consistency import Async
from ps.layout import Layout, plan_layout
from ps.push import Push
from ps.rules import SGD, Ema
from ps.schedule import Constant, Horizon
from ps.server import ShardServer
from ps.shard import (
    ShardConfig,
    initial_state,
)


def segments_of(num_parameters):
    """A bias and a kernel, of which the last has all but three quanta."""
    kernel = num_parameters - 3 * ALIGNMENT
    return (Segment("bias", (41,), 0, False), Segment("kernel", (kernel,), 3 * ALIGNMENT, True))


def shard_configs(layout: Layout, rule, schedule, max_staleness=None):
    horizon = Horizon(epoch_samples=100, num_workers=4)
    policy = Async(max_staleness=max_staleness)
    return [
        ShardConfig(ranges, rule, schedule, horizon, Ema(decay=0.9), policy)
        for ranges in layout.shards
    ]


class Cluster:
    """Shard servers, started and not yet loaded."""

    def __init__(
        self,
        num_shards,
        num_parameters=352,
        rule=SGD(),  # noqa: B008 (frozen)
        schedule=Constant(lr=1.0),  # noqa: B008
        max_staleness=None,
    ):
        self.num_parameters = num_parameters
        self.layout = plan_layout(segments_of(num_parameters), STATISTICS, num_shards)
        configs = shard_configs(self.layout, rule, schedule, max_staleness)
        self.services = [WatchedService(config) for config in configs]
        self.servers = [ShardServer(s, HOST, TOKEN, num_workers=8) for s in self.services]
        self.clients: list[ParameterClient] = []
        for server in self.servers:
            server.start()

    @property
    def addresses(self):
        return [server.address for server in self.servers]

    def client(self, retry=PATIENT):
        self.clients.append(ParameterClient(self.addresses, self.layout, TOKEN, retry))
        return self.clients[-1]

    def first_state(self, start=0.0):
        rule = self.services[0].config.rule
        parameters = torch.full((self.num_parameters,), start)
        state = initial_state(rule, parameters, torch.zeros(NUM_STATISTICS))
        return ModelState(state.clocks, state.vectors, {})

    def load(self, start=0.0):
        self.client().load(self.first_state(start))

    def close(self):
        for client in self.clients:
            client.close()
        for server in self.servers:
            server.stop()


@contextmanager
def starting():
    """Starts clusters, and ends them with the block."""
    clusters = []

    def build(*arguments, **settings):
        clusters.append(Cluster(*arguments, **settings))
        return clusters[-1]

    yield build
    for cluster in clusters:
        cluster.close()


def room(cluster):
    return torch.full((cluster.num_parameters,), 99.0), torch.full((NUM_STATISTICS,), 99.0)


def push_ones(client, worker, sequence, pulled=None, incarnation=0, value=1.0):
    """Takes 1 from every parameter, with SGD and lr 1, and adds 1 to every statistic."""
    return client.push(
        worker,
        incarnation,
        sequence,
        pulled or [0] * len(client.shards),
        2,
        torch.full((client.layout.num_parameters,), value),
        torch.ones(client.layout.num_statistics),
    )


def push_to_one_shard(client, index, worker, sequence):
    ranges = client.layout.shards[index]
    gradient, delta = torch.ones(ranges.parameters.numel), torch.ones(ranges.statistics.numel)
    return client.shards[index].push(Push(worker, 0, sequence, 0, 2, gradient, delta))


@contextmanager
def pushers(cluster, num_workers):
    """Workers that push ones without pause until the block ends; each has begun before it."""
    enough, begun = threading.Event(), [threading.Event() for _ in range(num_workers)]

    def work(worker):
        client = cluster.client()
        for sequence in takewhile(lambda _: not enough.is_set(), count()):
            assert push_ones(client, worker, sequence)
            begun[worker].set()

    futures = [background(lambda worker=worker: work(worker)) for worker in range(num_workers)]
    try:
        assert all(each.wait(DEADLINE_S) for each in begun)
        yield
    finally:
        enough.set()
        for future in futures:
            future.result(DEADLINE_S)


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now_s, self.pauses_s = 0.0, []

    def clock(self):
        return self.now_s

    def sleep(self, pause_s):
        self.pauses_s.append(pause_s)
        self.now_s += pause_s
