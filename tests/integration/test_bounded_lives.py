"""Bounded staleness over real sockets: workers that wait, die half way through a push, return."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lane_cluster import NUM_PARAMETERS, NUM_STATISTICS, Cluster, layout_of
from waiting import DEADLINE_S

from ps.consistency import Async, Bounded
from ps.push import Push

WORKERS = 3  # what `config_of` says
LANES = ["shm", "tcp", "grpc"]


def pulled(client, worker):
    """Versions, by shard."""
    parameters, statistics = torch.empty(NUM_PARAMETERS), torch.empty(NUM_STATISTICS)
    return client.pull(parameters, statistics, None, worker)


def ones(worker, incarnation, sequence, versions):
    vectors = torch.ones(NUM_PARAMETERS), torch.ones(NUM_STATISTICS)
    return worker, incarnation, sequence, versions, 4, *vectors


@pytest.fixture
def cluster():
    made = Cluster(layout_of(2), policy=Bounded(slack=0))
    made.load()
    yield made
    made.close()


@pytest.mark.parametrize("lane", LANES)
def test_all_go_on_after_deaths_at_any_moment(cluster, lane):
    """Worker 2 dies again and again with its push settled at one of two shards."""
    steps, lives = 30, 5

    def work(worker):
        client = cluster.client(lane)
        for sequence in range(steps):
            versions = pulled(client, worker)
            client.push(*ones(worker, 0, sequence, versions))
        finish(worker)

    def die_again_and_again():
        client = cluster.client(lane)
        for life in range(lives):
            if life:
                client.enter(2, life)
            for sequence in range(3):
                versions = pulled(client, 2)
                client.push(*ones(2, life, sequence, versions))
            versions = pulled(client, 2)
            shard, ranges = life % 2, cluster.layout.shards[life % 2]
            vectors = (torch.ones(ranges.parameters.numel), torch.ones(ranges.statistics.numel))
            client.shards[shard].push(Push(2, life, 3, versions[shard], 4, *vectors))
            client.fence(2, life + 1)
        finish(2)

    # One client tells of all: each numbers what it tells.
    done, herald, telling = set(), cluster.client(), threading.Lock()

    def finish(worker):
        with telling:
            done.add(worker)
            herald.expect(set(range(WORKERS)) - done)

    with ThreadPoolExecutor(WORKERS) as threads:
        calls = [threads.submit(work, 0), threads.submit(work, 1)]
        calls.append(threads.submit(die_again_and_again))
        for call in calls:
            call.result(DEADLINE_S)
    applied = [service.status().clocks.updates for service in cluster.services]
    assert applied == [2 * steps + lives * 3 + 3, 2 * steps + lives * 3 + 2]


def test_compensation_that_is_due_and_not_to_be_had_is_counted():
    cluster = Cluster(layout_of(2), policy=Async(delay_compensation=0.5))
    cluster.load()
    try:
        client = cluster.client("tcp")
        versions = pulled(client, 0)
        client.push(*ones(1, 0, 0, versions))
        client.push(*ones(0, 0, 0, versions))
        assert [status.num_uncompensated for status in client.describe()] == [0, 0]
        client.push(*ones(1, 0, 1, versions))
        assert [status.num_uncompensated for status in client.describe()] == [1, 1]
    finally:
        cluster.close()
