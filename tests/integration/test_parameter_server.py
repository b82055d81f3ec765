"""Whole clients against real shard servers over gRPC on 127.0.0.1, with what can go wrong there.

Shards run in this process, where a test can look inside, unless their death is the subject.
"""

import pickle
import socket
from itertools import count

import grpc
import psutil
import pytest
import torch
from lane_cluster import (
    HOST,
    NUM_STATISTICS,
    PATIENT,
    STATISTICS,
    TOKEN,
    assert_at,
    assert_whole,
)
from service_cluster import (
    push_ones,
    push_to_one_shard,
    pushers,
    room,
    segments_of,
    shard_configs,
    starting,
)
from waiting import DEADLINE_S, background, eventually

from ps.client import (
    ModelState,
    ParameterClient,
)
from ps.layout import plan_layout
from ps.push import Push
from ps.receipts import Settled
from ps.rules import SGD, RMSprop
from ps.schedule import Clocks, Constant, Exponential
from ps.server import ShardServer
from ps.service import ShardService
from ps.shard import (
    Outcome,
    Shard,
    ShardState,
    initial_state,
    vector_names,
)


@pytest.fixture
def start():
    with starting() as start:
        yield start


# There and back


DEMANDING = Exponential(lr=0.1, decay=0.5, every=4, unit="samples")


def random_model_state(cluster, rule):
    generator = torch.Generator().manual_seed(5)
    statistics = {"statistics", "ema_statistics"}
    vectors = {
        name: torch.rand(
            NUM_STATISTICS if name in statistics else cluster.num_parameters, generator=generator
        )
        for name in vector_names(rule)
    }
    return ModelState(Clocks(7, 14), vectors, {})


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_load_again_pull_push_cut_and_read(start, num_shards):
    """Against one shard without any network, bit for bit, on all vectors."""
    rule = RMSprop(weight_decay=0.01)
    cluster = start(num_shards, rule=rule, schedule=DEMANDING)
    client, state = cluster.client(), random_model_state(cluster, rule)
    for _ in range(2):
        client.load(ModelState(state.clocks, state.vectors, {4: {2: 8}}))
    assert [s.last_sequences for s in client.describe()] == [{4: {2: 8}}] * num_shards
    whole = plan_layout(segments_of(cluster.num_parameters), STATISTICS, 1)
    (config,) = shard_configs(whole, rule, DEMANDING)
    reference = Shard(config, ShardState(state.clocks, state.vectors, {4: {2: 8}}))

    parameters, statistics = room(cluster)
    assert client.pull(parameters, statistics) == [7] * num_shards
    assert torch.equal(parameters, state.vectors["parameters"])
    assert torch.equal(statistics, state.vectors["statistics"])

    for sequence in range(5):
        gradient, delta = torch.randn(cluster.num_parameters), torch.randn(NUM_STATISTICS)
        push = Push(3, 1, sequence, 6, 2, gradient.clone(), delta.clone())
        receipts = client.push(3, 1, sequence, [6] * num_shards, 2, gradient, delta)
        assert receipts == [reference.push(push)] * num_shards

    client.cut("copy", wait_s=0)
    copy, expected = client.read("copy"), reference.capture()
    assert (copy.clocks, copy.version_skew) == (Clocks(12, 24), 0)
    assert copy.last_sequences == {3: {1: 4}, 4: {2: 8}}
    assert list(copy.vectors) == list(expected.vectors)
    for name, vector in expected.vectors.items():
        assert torch.equal(copy.vectors[name], vector), name
    client.pull(parameters, statistics)
    assert torch.equal(parameters, expected.vectors["parameters"])
    assert torch.equal(statistics, expected.vectors["statistics"])

    with pytest.raises(grpc.RpcError, match="settled pushes"):
        client.load(state)
    client.pull(parameters, statistics)
    assert torch.equal(parameters, expected.vectors["parameters"]), "a late Load undoes nothing"


def test_a_push_leaves_the_callers_vectors_alone(loaded):
    client = loaded(2, rule=SGD(weight_decay=0.5)).client()
    gradient, delta = torch.ones(352), torch.ones(NUM_STATISTICS)
    for sequence in range(2):
        client.push(0, 0, sequence, [0, 0], 1, gradient, delta)
    assert (gradient == 1).all()
    assert (delta == 1).all()


@pytest.mark.parametrize("num_shards", [1, 3])
def test_describe_counts_what_each_shard_did(loaded, num_shards):
    client = loaded(num_shards, max_staleness=1).client()
    for sequence in range(3):
        push_ones(client, 0, sequence)
    push_ones(client, 0, 2)  # a retry isn't counted
    push_ones(client, 1, 0, value=torch.nan)
    for status in client.describe():
        assert status.clocks == Clocks(2, 4)
        assert status.pushes == {"applied": 2, "stale": 1, "not_finite": 1}
        assert status.last_sequences == {0: {0: 2}, 1: {0: 0}}
        assert status.num_buffers == 2
        assert status.apply_s > 0


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_fence_refuses_earlier_lives_at_every_shard(loaded, num_shards):
    client = loaded(num_shards).client()
    push_ones(client, 4, 0)
    push_ones(client, 4, 1)
    assert client.fence(4, 1) == {0: Settled(1, 1)}
    zombie = push_ones(client, 4, 2, incarnation=0)
    assert {receipt.outcome for receipt in zombie} == {Outcome.FENCED}
    assert_at(client, [2] * num_shards)
    assert client.fence(4, 1) == {0: Settled(1, 1)}
    push_ones(client, 4, 0, incarnation=1)
    assert_at(client, [3] * num_shards)
    assert client.fence(9, 5) == {}


def test_a_fence_tells_what_all_shards_have_settled(loaded):
    client = loaded(2).client()
    push_ones(client, 0, 0)
    push_to_one_shard(client, 1, worker=0, sequence=1)
    push_to_one_shard(client, 0, worker=5, sequence=0)
    assert client.fence(0, 1) == {0: Settled(0, 1)}
    assert client.fence(5, 1) == {0: Settled(-1, 0)}


def test_release_frees_the_copy_and_reading_it_then_is_an_error(loaded):
    client = loaded(2).client()
    client.cut("copy", ["ema"], wait_s=0)
    assert list(client.read("copy").vectors) == ["ema"]
    client.release("copy")
    client.release("copy")
    with pytest.raises(grpc.RpcError) as missing:
        client.read("copy")
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND
    told = pickle.loads(pickle.dumps(missing.value))  # to another process; gRPC's own can't be
    assert isinstance(told, grpc.RpcError)
    assert (told.code(), told.details()) == (missing.value.code(), missing.value.details())


def test_a_model_without_statistics_travels(start):
    layout = plan_layout(segments_of(352), (), 2)
    services = [ShardService(c) for c in shard_configs(layout, SGD(), Constant(lr=1.0))]
    servers = [ShardServer(service, HOST, TOKEN, 2) for service in services]
    for server in servers:
        server.start()
    client = ParameterClient([server.address for server in servers], layout, TOKEN, PATIENT)
    state = initial_state(SGD(), torch.zeros(352), torch.zeros(0))
    client.load(ModelState(state.clocks, state.vectors, {}))
    push_ones(client, 0, 0)
    assert_at(client, [1, 1])
    client.cut("copy", wait_s=0)
    assert client.read("copy").vectors["statistics"].numel() == 0
    client.close()
    for server in servers:
        server.stop()


# Cuts over several shards


def test_a_cut_waits_until_all_shards_are_at_one_version(loaded):
    """Shard 0 is ahead; the cut is set before another push arrives."""
    cluster = loaded(3)
    client = cluster.client()
    for sequence in range(2):
        push_ones(client, 0, sequence)
    push_to_one_shard(client, 0, worker=1, sequence=0)
    cut = background(lambda: client.cut("copy", wait_s=DEADLINE_S))
    eventually(lambda: all("copy" in service._cuts for service in cluster.services))
    pushing = cluster.client()
    for sequence in count(2):
        push_ones(pushing, 0, sequence)
        if cut.done():
            break
    cut.result()
    state = client.read("copy")
    assert state.version_skew == 0
    assert state.clocks.updates > 3
    assert (state.vectors["parameters"] == -state.clocks.updates).all()
    assert (state.vectors["statistics"] == state.clocks.updates).all()


def test_a_cut_without_waiting_says_by_how_much_shards_differ(loaded):
    client = loaded(3).client()
    push_ones(client, 0, 0)
    for sequence in range(2):
        push_to_one_shard(client, 1, worker=1, sequence=sequence)
    client.cut("copy", wait_s=0)
    state = client.read("copy")
    assert (state.clocks, state.version_skew) == (Clocks(1, 2), 2)
    assert state.last_sequences == {0: {0: 0}}
    versions = [1, 3, 1]
    assert_whole(client.layout, versions, state.vectors["parameters"], state.vectors["statistics"])


def test_a_cut_that_nobody_reaches_ends_after_its_wait(loaded):
    client = loaded(2).client()
    push_ones(client, 0, 0)
    client.cut("copy", wait_s=0.01)
    assert client.read("copy").clocks == Clocks(1, 2)


def test_cuts_under_fire_are_of_one_version_each(loaded):
    cluster = loaded(3, num_parameters=4000)
    client = cluster.client()
    with pushers(cluster, 2):
        for _ in range(10):
            client.cut("copy", ["parameters", "statistics"], wait_s=DEADLINE_S)
            state = client.read("copy")
            low = state.clocks.updates
            for ranges in cluster.layout.shards:
                part = state.vectors["parameters"][ranges.parameters.slice()]
                version = -part[0].item()
                assert low <= version <= low + state.version_skew
                assert (part == -version).all()
                assert (state.vectors["statistics"][ranges.statistics.slice()] == version).all()


# The network


def test_a_server_listens_at_its_host_alone(start):
    cluster = start(2)
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    ports = {int(address.rsplit(":", 1)[1]) for address in cluster.addresses}
    assert {ip for ip, port in listening if port in ports} == {HOST}
    for port in ports:  # another address of this very machine
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), DEADLINE_S)


def test_a_server_stops_to_listen(start):
    cluster = start(1)
    cluster.servers[0].stop()
    port = int(cluster.addresses[0].rsplit(":", 1)[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), DEADLINE_S)
