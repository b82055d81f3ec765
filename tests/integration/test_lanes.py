"""What all lanes promise, tested alike in each: shm, tcp and grpc."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count, takewhile

import grpc
import pytest
import torch
from lane_cluster import (
    BFLOAT16,
    HASTY,
    NUM_PARAMETERS,
    NUM_STATISTICS,
    assert_at,
    assert_holds_the_same,
    assert_whole,
    config_of,
    held,
    layout_of,
    pull,
    push_ones,
    push_shared_ones,
)
from waiting import DEADLINE_S, background, eventually

from ps import shard_client
from ps.client import ModelState, RetryPolicy, ShardUnavailable
from ps.consistency import Bounded, Sync
from ps.lanes.segment import shared_zeros
from ps.push import Push
from ps.receipts import Settled
from ps.rules import RMSprop
from ps.schedule import Clocks
from ps.shard import Outcome, Receipt, Shard, ShardState, vector_names
from ps.wire import AS_IS


@pytest.fixture(params=["shm", "tcp", "grpc"])
def lane(request):
    return request.param


@pytest.fixture(params=[AS_IS, BFLOAT16], ids=["float32", "bfloat16"])
def wire(request):
    return request.param


# There and back


def any_bits(numel, seed):
    """Any float32 at all as a parameter, also NaNs with payloads, infinities and denormals."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (numel,), generator=generator)
    return bits.to(torch.int32).view(torch.float32)


def bits_of(vector):
    return vector.view(torch.int32)


def rounded(vector, dtype):
    return vector.to(dtype).float()


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("num_parameters", [NUM_PARAMETERS, 600_000])
def test_a_pull_brings_every_bit(start, lane, wire, num_shards, num_parameters):
    """Of float32; as bf16 it brings the nearest of those numbers, NaN for NaN."""
    cluster = start(layout_of(num_shards, num_parameters))
    statistics = {"statistics", "ema_statistics"}
    vectors = {
        name: any_bits(NUM_STATISTICS if name in statistics else num_parameters, seed)
        for seed, name in enumerate(vector_names(cluster.services[0].config.rule))
    }
    client = cluster.client(lane)
    client.load(ModelState(Clocks(7, 14), vectors, {}))
    assert client.connect() == client.lanes == [lane] * num_shards
    versions, *pulled = pull(client)
    assert versions == [7] * num_shards
    if wire is AS_IS:
        assert torch.equal(bits_of(pulled[0]), bits_of(vectors["parameters"]))
    expected = rounded(vectors["parameters"], wire.pull_dtype)
    torch.testing.assert_close(pulled[0], expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(bits_of(pulled[1]), bits_of(vectors["statistics"]))
    assert client.lanes == [lane] * num_shards


@pytest.mark.parametrize("make", [torch.zeros, shared_zeros])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_pushes_do_what_they_do_without_a_network(loaded, lane, wire, num_shards, make):
    """Bit for bit, with weight decay; and the pusher's vectors stay as they are.

    As bf16, they do what gradients do that were rounded before.
    """
    rule = RMSprop(weight_decay=0.01)
    cluster = loaded(layout_of(num_shards, 5008), rule=rule)
    whole = layout_of(1, 5008)
    zeros = {name: torch.zeros(5008) for name in vector_names(rule)}
    zeros |= {name: torch.zeros(NUM_STATISTICS) for name in ("statistics", "ema_statistics")}
    zeros["slot.mean_square"] = torch.ones(5008)
    reference = Shard(config_of(whole.shards[0], rule), ShardState(Clocks(), zeros))
    client, generator = cluster.client(lane), torch.Generator().manual_seed(3)
    gradient, delta = make(5008), make(NUM_STATISTICS)
    for sequence in range(4):
        gradient.copy_(torch.randn(5008, generator=generator))
        delta.copy_(torch.randn(NUM_STATISTICS, generator=generator))
        sent = (gradient.clone(), delta.clone())
        receipts = client.push(2, 1, sequence, [0] * num_shards, 3, gradient, delta)
        arrived = (rounded(sent[0], wire.push_dtype), sent[1])
        assert receipts == [reference.push(Push(2, 1, sequence, 0, 3, *arrived))] * num_shards
        assert torch.equal(gradient, sent[0])
        assert torch.equal(delta, sent[1])
    expected = reference.capture()
    versions, parameters, statistics = pull(client)
    assert versions == [4] * num_shards
    assert torch.equal(parameters, rounded(expected.vectors["parameters"], wire.pull_dtype))
    assert torch.equal(statistics, expected.vectors["statistics"])
    assert client.lanes == [lane] * num_shards


def test_a_model_without_statistics_travels(loaded, lane):
    client = loaded(layout_of(2, statistics=())).client(lane)
    push_ones(client, 0, 0)
    push_shared_ones(client, 0, 1)
    assert_at(client, [2, 2])
    assert client.lanes == [lane] * 2


# Updates and pulls at once


def test_pulls_under_fire_are_never_torn_and_hold_nothing_up(loaded, lane, wire):
    cluster = loaded(layout_of(2, 600_000))
    client, enough, seen = cluster.client(lane), threading.Event(), set()
    workers = [cluster.client(lane) for _ in range(2)]

    def push_on(worker):
        for sequence in takewhile(lambda _: not enough.is_set(), count(1)):
            assert push_shared_ones(workers[worker], worker, sequence)

    def versions_seen():
        versions, parameters, statistics = pull(client)
        assert_whole(cluster.layout, versions, parameters, statistics, wire)
        seen.update(versions)
        return len(seen)

    for worker in range(2):  # all connections are open then: to ask for one pins a version
        push_shared_ones(workers[worker], worker, 0)
    versions_seen()
    pushers = [background(lambda worker=worker: push_on(worker)) for worker in range(2)]
    for _ in range(30):
        versions_seen()
    eventually(lambda: versions_seen() > 3)
    eventually(lambda: client.describe()[0].clocks.updates > 20)
    enough.set()
    for pusher in pushers:
        pusher.result(DEADLINE_S)
    assert client.describe()[0].num_buffers <= 3


def test_a_pull_ends_while_an_update_holds_the_lock(loaded, lane):
    cluster = loaded()
    client = cluster.client(lane)
    client.connect()
    with cluster.services[0]._lock:
        background(lambda: assert_at(client, [0])).result(DEADLINE_S)


def test_a_push_ends_while_a_reader_holds_a_pin(loaded, lane):
    cluster = loaded()
    client = cluster.client(lane)
    with cluster.services[0].pinned() as snapshot:
        for sequence in range(4):
            push_ones(client, 0, sequence)
        assert (snapshot.parameters == 0).all()
    assert_at(client, [4])


# Waiting pulls


@pytest.mark.parametrize("attempt_s", [1.0, 7200.0])
def test_a_waiting_pull_gets_its_version_and_keeps_nobody_waiting(
    loaded, lane, attempt_s, monkeypatch
):
    """A server holds a pull for half an attempt: it is asked again and again, or once."""
    monkeypatch.setattr(shard_client, "MAX_PULL_WAIT_S", 3600.0)
    cluster = loaded(layout_of(2), policy=Sync())
    client, other = cluster.client(lane), cluster.client(lane)
    client.connect()  # a lane that never worked is given up after two failures
    retry = RetryPolicy(attempt_s=attempt_s, deadline_s=DEADLINE_S)
    for shard in client.shards:
        monkeypatch.setattr(shard._retrying, "policy", retry)
    assert {r.outcome for r in push_ones(client, 0, 0)} == {Outcome.ACCUMULATED}
    waiting = background(lambda: pull(client, [1, 1]))
    assert {r.outcome for r in push_ones(client, 1, 0)} == {Outcome.ACCUMULATED}
    assert pull(other)[0] == [0, 0]
    assert not waiting.done()
    assert {r.outcome for r in push_ones(client, 2, 0)} == {Outcome.APPLIED}
    versions, parameters, _ = waiting.result(DEADLINE_S)
    assert versions == [1, 1]
    assert (parameters == -1).all()


def test_workers_keep_step_whatever_their_order(loaded, lane):
    cluster, together = loaded(layout_of(2), policy=Sync()), threading.Barrier(3)

    def work(worker):
        client = cluster.client(lane)
        together.wait(DEADLINE_S)
        for step in range(20):
            push_shared_ones(client, worker, step, pulled=step)
            versions, parameters, _ = pull(client, [step + 1] * 2)
            assert versions == [step + 1] * 2
            assert (parameters == -(step + 1)).all()
        return True

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(work, range(3), timeout=DEADLINE_S))


def test_a_pull_of_a_worker_waits_until_the_policy_lets_it(loaded, lane, monkeypatch):
    """And asks again where the server doesn't hold it so long; others' pulls don't wait."""
    monkeypatch.setattr(shard_client, "MAX_PULL_WAIT_S", 0.05)
    cluster, asked = loaded(layout_of(2), policy=Bounded(slack=1)), set()
    reached = cluster.services[0].reached

    def note(version, wait_s, worker):
        asked.add((worker, wait_s))
        return reached(version, wait_s, worker)

    monkeypatch.setattr(cluster.services[0], "reached", note)
    client, others = cluster.client(lane), cluster.client(lane)
    for sequence in range(2):
        assert pull(client, worker=0)[0] == [sequence] * 2
        push_ones(client, 0, sequence)
    waiting = background(lambda: pull(client, worker=0))
    assert pull(others)[0] == [2, 2]
    assert pull(others, worker=1)[0] == [2, 2]
    push_ones(others, 1, 0)
    assert not waiting.done()
    push_ones(others, 2, 0)
    assert waiting.result(DEADLINE_S)[0] == [4, 4]
    assert asked == {(0, 0.05), (1, 0.05), (None, 0.0)}


def test_closing_ends_a_pull_that_waits(loaded, lane):
    cluster = loaded(policy=Sync())
    client = cluster.client(lane, HASTY)
    client.connect()
    waiting = background(lambda: pull(client, [1]))
    eventually(lambda: cluster.services[0]._published._waiters)
    client.close()
    assert waiting.exception(DEADLINE_S) is not None


# What is refused


def test_a_fence_refuses_earlier_lives(loaded, lane):
    client = loaded(layout_of(2)).client(lane)
    push_shared_ones(client, 4, 0)
    assert client.fence(4, 1) == {0: Settled(0, 0)}
    zombie = push_shared_ones(client, 4, 1)
    assert {receipt.outcome for receipt in zombie} == {Outcome.FENCED}
    assert_at(client, [1, 1])
    push_shared_ones(client, 4, 0, incarnation=1)
    assert_at(client, [2, 2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_dropped_with_a_receipt(loaded, lane, value):
    cluster = loaded()
    client = cluster.client(lane)
    before = held(cluster.services[0])[0]
    assert push_shared_ones(client, 0, 0, value=value) == [Receipt(Outcome.NOT_FINITE, 0, 0, 1.0)]
    after = held(cluster.services[0])[0]
    assert after.clocks == before.clocks
    assert all(torch.equal(after.vectors[n], v) for n, v in before.vectors.items())
    assert push_shared_ones(client, 0, 1)[0].outcome is Outcome.APPLIED


@pytest.mark.parametrize("numels", [(336, 64), (368, 64), (352, 48), (336, 80), (0, 0)])
def test_a_push_of_another_length_is_refused(loaded, lane, numels):
    cluster = loaded()
    client = cluster.client(lane)
    push_ones(client, 0, 0)
    before = held(cluster.services[0])
    with pytest.raises(grpc.RpcError) as refused:
        client.shards[0].push(Push(0, 0, 1, 0, 2, *(torch.ones(numel) for numel in numels)))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_holds_the_same(before, cluster.services[0])
    push_ones(client, 0, 1)
    assert_at(client, [2])


def test_a_pull_into_vectors_of_another_layout_is_a_bug(loaded, lane):
    client = loaded().client(lane)
    with pytest.raises(AssertionError, match="layout"):
        client.shards[0].pull(torch.zeros(336), torch.zeros(NUM_STATISTICS + 16))
    assert_at(client, [0])


@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_a_push_of_another_dtype_is_refused(loaded, lane, dtypes):
    cluster = loaded()
    client = cluster.client(lane, wire=AS_IS)
    before = held(cluster.services[0])
    vectors = (torch.ones(numel) for numel in (NUM_PARAMETERS, NUM_STATISTICS))
    with pytest.raises(grpc.RpcError, match=r"bfloat16|float64") as refused:
        client.shards[0].push(
            Push(0, 0, 0, 0, 2, *(v.to(d) for v, d in zip(vectors, dtypes, strict=True)))
        )
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_holds_the_same(before, cluster.services[0])
    push_ones(client, 0, 0)
    assert_at(client, [1])


@pytest.mark.parametrize(("sequence", "num_samples"), [(-1, 1), (0, 0), (0, -3)])
def test_a_push_that_cannot_be_meant_is_refused(loaded, lane, sequence, num_samples):
    cluster = loaded()
    client = cluster.client(lane)
    before = held(cluster.services[0])
    vectors = (torch.ones(NUM_PARAMETERS), torch.ones(NUM_STATISTICS))
    with pytest.raises(grpc.RpcError) as refused:
        client.shards[0].push(Push(0, 0, sequence, 0, num_samples, *vectors))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_holds_the_same(before, cluster.services[0])
    push_ones(client, 0, 0)
    assert_at(client, [1])


def test_a_repeated_push_whose_receipt_is_forgotten_is_refused(loaded, lane):
    client = loaded().client(lane)
    for sequence in range(20):
        push_ones(client, 0, sequence)
    with pytest.raises(grpc.RpcError, match="push 0 of worker 0, incarnation 0") as refused:
        push_ones(client, 0, 0)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert push_ones(client, 0, 19) == [Receipt(Outcome.APPLIED, 19, 19, 1.0)]
    assert_at(client, [20])


def test_before_load_there_is_nothing_to_pull_or_push(start, lane):
    cluster = start()
    client = cluster.client(lane)
    for call in (pull, lambda client: push_ones(client, 0, 0)):
        with pytest.raises(grpc.RpcError) as refused:
            call(client)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    cluster.load()
    push_ones(client, 0, 0)
    assert_at(client, [1])
    assert client.lanes == [lane]


def test_without_the_token_there_is_no_lane(loaded, lane):
    cluster = loaded()
    client = cluster.client(lane, token="guess")
    for call in (pull, lambda client: push_ones(client, 0, 0)):
        with pytest.raises(grpc.RpcError) as refused:
            call(client)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert cluster.gate.num_connections == 0
    assert_at(cluster.client(lane), [0])


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_a_dead_server_is_reported(loaded, lane):
    """For gRPC see test_parameter_server_deaths.py: a server that stops in the client's own
    process, at that moment, can keep a call from ever hearing of its deadline."""
    cluster = loaded()
    client = cluster.client(lane, RetryPolicy(attempt_s=10.0, deadline_s=0.1, backoff_s=0.01))
    push_ones(client, 0, 0)
    cluster.servers[0].stop()
    with pytest.raises(ShardUnavailable, match=cluster.addresses[0]):
        pull(client)
    with pytest.raises(ShardUnavailable, match=cluster.addresses[0]):
        push_ones(client, 0, 1)
