"""Pulls and pushes under fire, and answers that are lost or late, over gRPC on 127.0.0.1."""

import threading
from collections import Counter
from collections.abc import Callable
from itertools import count, islice

import grpc
import pytest
import torch
from lane_cluster import (
    assert_at,
    assert_whole,
)
from service_cluster import push_ones, pushers, room, starting
from waiting import DEADLINE_S, background, eventually

from ps.client import (
    RetryPolicy,
)
from ps.lanes import grpc as lane
from ps.shard import (
    Outcome,
    Receipt,
)


@pytest.fixture
def start():
    with starting() as start:
        yield start


# Pulls under fire


def test_pulls_under_fire_are_never_torn(loaded):
    """Of several messages each, so that many pushes land in the middle of every pull."""
    cluster = loaded(2, num_parameters=1_200_000)
    client, seen = cluster.client(), set()

    def versions_seen():
        parameters, statistics = room(cluster)
        versions = client.pull(parameters, statistics)
        assert_whole(cluster.layout, versions, parameters, statistics)
        seen.update(versions)
        return len(seen)

    with pushers(cluster, 2):
        for _ in range(40):
            versions_seen()
        eventually(lambda: versions_seen() > 5)
        eventually(lambda: client.describe()[0].clocks.updates > 20)


def test_a_pull_ends_while_an_update_holds_the_lock(loaded):
    cluster = loaded(1)
    client = cluster.client()
    with cluster.services[0]._lock:
        background(lambda: assert_at(client, [0])).result(DEADLINE_S)


def test_work_is_conserved_over_concurrent_workers_and_lost_answers(start, monkeypatch):
    """Every push is settled once at each shard, as its receipt says, whatever was sent again."""
    losses = count(1)
    lose_answers(monkeypatch, lambda: next(losses) % 3 == 0)
    cluster = start(3, max_staleness=4)
    cluster.load()
    num_workers, num_pushes = 4, 25

    def work(worker):
        client, receipts = cluster.client(), []
        parameters, statistics = room(cluster)
        for sequence in range(num_pushes):
            if sequence % 3 == 0:  # local copies grow stale, so that some pushes are dropped
                versions = client.pull(parameters, statistics)
            bad = sequence % 7 == 6
            receipts.append(
                push_ones(client, worker, sequence, versions, value=torch.nan if bad else 1.0)
            )
        return receipts

    futures = [background(lambda worker=worker: work(worker)) for worker in range(num_workers)]
    receipts = [receipt for future in futures for receipt in future.result(DEADLINE_S)]
    outcomes = [Counter(r[index].outcome for r in receipts) for index in range(3)]
    assert next(losses) > num_workers * num_pushes * 3  # some were lost
    client = cluster.client()
    for outcome, status in zip(outcomes, client.describe(), strict=True):
        assert status.clocks.updates == outcome[Outcome.APPLIED] > 0
        assert status.pushes == {o.value: n for o, n in outcome.items()}
        assert sum(outcome.values()) == num_workers * num_pushes
        assert outcome[Outcome.NOT_FINITE] == num_workers * (num_pushes // 7)
    for index in range(3):  # the versions that applied pushes met are 0, 1, 2, ..., once each
        met = [r[index].version for r in receipts if r[index].outcome is Outcome.APPLIED]
        assert sorted(met) == list(range(len(met)))
    assert_at(client, [outcome[Outcome.APPLIED] for outcome in outcomes])


# Lost answers and retries


def lose_answers(monkeypatch, lost: Callable[[], bool]) -> None:
    """Servers started from now on settle a push and then fail to answer where `lost()`."""
    settle = lane._ServingHalf.push

    def push(self, messages, context):
        answer = settle(self, messages, context)
        if lost():
            context.abort(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
        return answer

    monkeypatch.setattr(lane._ServingHalf, "push", push)


@pytest.mark.parametrize("num_losses", [1, 3])
def test_a_push_whose_answer_was_lost_is_applied_once(start, monkeypatch, num_losses):
    calls = count(1)
    lose_answers(monkeypatch, lambda: next(calls) <= num_losses)
    cluster = start(1)
    cluster.load()
    client = cluster.client()
    assert push_ones(client, 0, 0) == [Receipt(Outcome.APPLIED, 0, 0, 1.0)]
    assert next(calls) == num_losses + 2  # it was sent again and again
    assert_at(client, [1])
    assert push_ones(client, 0, 1) == [Receipt(Outcome.APPLIED, 1, 1, 1.0)]
    assert_at(client, [2])


def test_a_push_whose_answer_comes_too_late_is_applied_once(start, monkeypatch):
    """The first call stays under way, past its deadline, until the second one is settled."""
    calls, second = count(1), threading.Event()

    def stall():
        if next(calls) == 1:
            assert second.wait(DEADLINE_S)
        else:
            second.set()
        return False

    lose_answers(monkeypatch, stall)
    cluster = start(1)
    cluster.load()
    impatient = RetryPolicy(attempt_s=0.2, deadline_s=DEADLINE_S, backoff_s=0.01)
    client = cluster.client(impatient)
    assert push_ones(client, 0, 0) == [Receipt(Outcome.APPLIED, 0, 0, 1.0)]
    assert second.is_set()
    assert_at(cluster.client(), [1])


def test_a_pull_that_breaks_off_is_pulled_again_whole(start, monkeypatch):
    whole, calls = lane._ServingHalf.pull, count()

    def pull(self, request, context):
        if next(calls) > 0:
            yield from whole(self, request, context)
        else:  # the header and the first of two messages
            yield from islice(whole(self, request, context), 2)
            context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")

    monkeypatch.setattr(lane._ServingHalf, "pull", pull)
    cluster = start(1, num_parameters=400_000)
    cluster.load()
    assert_at(cluster.client(), [0])
    assert next(calls) == 2
    eventually(lambda: cluster.services[0].in_use["pins"] == 0)


def test_a_pull_that_ends_early_without_an_error_is_pulled_again_whole(start, monkeypatch):
    whole, calls = lane._ServingHalf.pull, count()

    def pull(self, request, context):
        messages = whole(self, request, context)
        yield from (islice(messages, 2) if next(calls) == 0 else messages)

    monkeypatch.setattr(lane._ServingHalf, "pull", pull)
    cluster = start(1, num_parameters=400_000)
    cluster.load()
    assert_at(cluster.client(), [0])
    assert next(calls) == 2
