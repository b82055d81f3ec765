"""A worker is told what is in the version that it pulled, alike in each lane."""

import pytest
import torch
from lane_cluster import assert_at, layout_of, push_ones
from waiting import DEADLINE_S, background, eventually

from ps.client import ModelState
from ps.consistency import Sync
from ps.lanes.frames import MAX_MESSAGE_NUM_BYTES
from ps.messages import newest_pushes_message
from ps.schedule import Clocks
from ps.shard import Outcome, initial_state
from ps.snapshot import Pulled


@pytest.fixture(params=["shm", "tcp", "grpc"])
def lane(request):
    return request.param


def pulled(client, worker=0, at_least=0):
    ranges = client.layout.shards[0]
    vectors = torch.zeros(ranges.parameters.numel), torch.zeros(ranges.statistics.numel)
    return client.shards[0].pull(*vectors, at_least, worker)


def test_the_newest_push_of_each_worker_s_newest_life_is_told(loaded, lane):
    client = loaded().client(lane)
    assert pulled(client) == Pulled(0)
    push_ones(client, 0, 0)
    push_ones(client, 2, 0)
    push_ones(client, 2, 1)
    assert pulled(client) == Pulled(3, {0: (0, 0), 2: (0, 1)})
    client.fence(2, 1)
    assert pulled(client).newest_pushes[2] == (0, 1), "its new life has pushed nothing"
    push_ones(client, 2, 0, incarnation=1)
    assert pulled(client) == Pulled(4, {0: (0, 0), 2: (1, 0)})
    assert client.lanes == [lane]


def test_what_was_dropped_belongs_to_the_next_version(loaded, lane):
    client = loaded().client(lane)
    push_ones(client, 1, 0)
    (receipt,) = push_ones(client, 1, 1, value=torch.nan)
    assert receipt.outcome is Outcome.NOT_FINITE
    assert pulled(client) == Pulled(1, {1: (0, 0)})
    push_ones(client, 0, 0)
    assert pulled(client) == Pulled(2, {1: (0, 1), 0: (0, 0)})


def test_a_pull_that_waited_is_told_of_what_it_waited_for(loaded, lane):
    cluster = loaded(policy=Sync())
    client, other = cluster.client(lane), cluster.client(lane)
    for worker in range(2):
        push_ones(client, worker, 0)
    assert pulled(client) == Pulled(0), "what is in the sum is in no version yet"
    waiting = background(lambda: pulled(other, at_least=1))
    eventually(lambda: cluster.services[0]._published._waiters)
    push_ones(client, 2, 0)
    assert waiting.result(DEADLINE_S) == Pulled(1, dict.fromkeys(range(3), (0, 0)))


def test_who_is_no_worker_is_not_told(loaded, lane):
    client = loaded().client(lane)
    push_ones(client, 0, 0)
    assert pulled(client, worker=None) == Pulled(1)


@pytest.mark.parametrize("num_workers", [200, 2000])
def test_any_number_of_workers_fits(start, lane, num_workers):
    """An answer may take several frames, and the connection goes on."""
    cluster = start(layout_of())
    client = cluster.client(lane)
    numels = (client.layout.num_parameters, client.layout.num_statistics)
    vectors = initial_state(cluster.services[0].config.rule, *map(torch.zeros, numels)).vectors
    newest = {worker: (worker % 3, 10**6 + worker) for worker in range(num_workers)}
    size = newest_pushes_message(newest).ByteSize()
    assert (size > MAX_MESSAGE_NUM_BYTES) == (num_workers == 2000), f"{size} bytes"
    lives = {worker: {life: last} for worker, (life, last) in newest.items()}
    client.load(ModelState(Clocks(), vectors, lives))
    assert pulled(client) == Pulled(0, newest)
    push_ones(client, 0, 0, incarnation=3)
    assert pulled(client) == Pulled(1, newest | {0: (3, 0)})
    assert_at(client, [1])
    assert client.lanes == [lane]
