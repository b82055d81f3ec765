"""Synchronous workers over real gRPC: a pull waits for the version that a push helps to make."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model.flat import Segment
from ps.client import ModelState, ParameterClient, RetryPolicy
from ps.consistency import Sync
from ps.layout import plan_layout
from ps.rules import SGD, Ema
from ps.schedule import Constant, Horizon
from ps.server import ShardServer
from ps.service import ShardService
from ps.shard import Outcome, ShardConfig, initial_state

NUM_WORKERS, NUM_PARAMETERS, NUM_STATISTICS = 3, 64, 16
DEADLINE_S = 60.0


@pytest.fixture
def connect():
    """Opens clients of two shards that wait for three workers, at version 0 and parameters 0.

    A client serves one caller at a time, as a worker is one.
    """
    layout = plan_layout(
        (Segment("weight", (NUM_PARAMETERS,), 0, True),),
        (Segment("mean", (NUM_STATISTICS,), 0, False),),
        2,
    )
    horizon = Horizon(epoch_samples=100, num_workers=NUM_WORKERS)
    servers = [
        ShardServer(
            ShardService(
                ShardConfig(ranges, SGD(), Constant(lr=1.0), horizon, Ema(decay=0.9), Sync())
            ),
            "127.0.0.1",
            "token",
            NUM_WORKERS,
        )
        for ranges in layout.shards
    ]
    for server in servers:
        server.start()
    # Half an attempt is the longest that a server holds a pull: here it is asked again and again.
    retry = RetryPolicy(attempt_s=1.0, deadline_s=DEADLINE_S)
    clients = []

    def connect():
        clients.append(ParameterClient([s.address for s in servers], layout, "token", retry))
        return clients[-1]

    start = initial_state(SGD(), torch.zeros(NUM_PARAMETERS), torch.zeros(NUM_STATISTICS))
    connect().load(ModelState(start.clocks, start.vectors, {}))
    yield connect
    for client in clients:
        client.close()
    for server in servers:
        server.stop()


def push_ones(client, worker, step):
    receipts = client.push(
        worker, 0, step, [step] * 2, 4, torch.ones(NUM_PARAMETERS), torch.ones(NUM_STATISTICS)
    )
    return [receipt.outcome for receipt in receipts]


def pull(client, at_least=None):
    parameters, statistics = torch.empty(NUM_PARAMETERS), torch.empty(NUM_STATISTICS)
    return client.pull(parameters, statistics, at_least), parameters


def test_a_pull_waits_for_the_last_gradient_and_no_longer(connect):
    client = connect()
    assert push_ones(client, 0, 0) == [Outcome.ACCUMULATED] * 2
    assert push_ones(client, 1, 0) == [Outcome.ACCUMULATED] * 2
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pull, connect(), [1, 1])
        assert pull(client)[0] == [0, 0], "a pull that waits for nothing is answered at once"
        assert not waiting.done()
        assert push_ones(client, 2, 0) == [Outcome.APPLIED] * 2
        versions, parameters = waiting.result(DEADLINE_S)
    assert versions == [1, 1]
    assert (parameters == -1).all()


def test_a_pull_waits_no_longer_than_for_the_workers_that_are_left(connect):
    client = connect()
    push_ones(client, 0, 0)
    push_ones(client, 1, 0)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pull, connect(), [1, 1])
        client.expect({0, 1})
        assert waiting.result(DEADLINE_S)[0] == [1, 1]


def test_workers_keep_step_whatever_their_order(connect):
    """Three threads, each pulling what it helped to make: all see every version."""
    together = threading.Barrier(NUM_WORKERS)

    def work(worker):
        client, seen = connect(), []
        together.wait(DEADLINE_S)
        for step in range(20):
            push_ones(client, worker, step)
            versions, parameters = pull(client, [step + 1] * 2)
            assert (parameters == -(step + 1)).all()
            seen.append(versions)
        return seen

    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        lives = [threads.submit(work, worker) for worker in range(NUM_WORKERS)]
        expected = [[step + 1] * 2 for step in range(20)]
        assert all(life.result(DEADLINE_S) == expected for life in lives)
