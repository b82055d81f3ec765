"""What a shard server must refuse: strangers, malformed calls, and calls at the wrong time."""

import grpc
import pytest
import torch
from lane_cluster import (
    HOST,
    NUM_STATISTICS,
    PATIENT,
    TOKEN,
    assert_at,
)
from service_cluster import FakeTime, push_ones, starting
from waiting import DEADLINE_S

from protos import parameter_server_pb2 as pb
from protos import parameter_server_pb2_grpc as pb_grpc
from ps.client import (
    ShardClient,
)
from ps.lanes import grpc as lane
from ps.lanes.grpc import SERVICE
from ps.lanes.stream import chunks
from ps.messages import state_header
from ps.rules import SGD
from ps.schedule import Clocks
from ps.server import TOKEN_KEY, ShardServer
from ps.shard import (
    ShardState,
    initial_state,
)


@pytest.fixture
def start():
    with starting() as start:
        yield start


def held(service):
    """All that a service holds, copied: its state, its counters but the buffers, and its cuts."""
    with service._lock:
        shard = service._loaded()
        return shard.capture(), dict(shard.settled), dict(service._cuts)


def assert_holds_the_same(before, after):
    (state, settled, cuts), (later_state, later_settled, later_cuts) = before, after
    assert (state.clocks, state.last_sequences) == (later_state.clocks, later_state.last_sequences)
    for name, vector in state.vectors.items():
        assert torch.equal(vector, later_state.vectors[name]), name
    assert settled == later_settled
    assert cuts == later_cuts


def raw_calls(address, metadata):
    """Every method of both services, with requests that would be carried out."""
    channel = grpc.insecure_channel(address)
    control = pb_grpc.ParameterServerStub(channel)
    zeros = [torch.zeros(352), torch.zeros(NUM_STATISTICS)]
    vectors = initial_state(SGD(), *zeros).vectors
    state = ShardState(Clocks(50, 100), vectors)
    body = [pb.PushHeader(worker=1, num_samples=1).SerializeToString(), *chunks(zeros)]
    loading = [state_header(state).SerializeToString(), *chunks(list(vectors.values()))]
    read = pb.ReadRequest(name="kept").SerializeToString()

    def stream_out(method):
        return lambda messages: channel.stream_unary(f"/{SERVICE}/{method}", None, None)(
            iter(messages), DEADLINE_S, metadata
        )

    def stream_in(method):
        return lambda request: list(
            channel.unary_stream(f"/{SERVICE}/{method}", None, None)(request, DEADLINE_S, metadata)
        )

    def unary(method):
        return lambda request: getattr(control, method)(request, DEADLINE_S, metadata)

    return {
        "Describe": (unary("Describe"), pb.DescribeRequest()),
        "Fence": (unary("Fence"), pb.FenceRequest(worker=0, incarnation=7)),
        "Cut": (unary("Cut"), pb.CutRequest(name="new")),
        "Release": (unary("Release"), pb.ReleaseRequest(name="kept")),
        "Expect": (unary("Expect"), pb.ExpectRequest(workers=[0], number=1)),
        "Enter": (unary("Enter"), pb.EnterRequest(worker=0, incarnation=3)),
        "OpenLane": (unary("OpenLane"), pb.OpenLaneRequest()),
        "Pull": (stream_in("Pull"), b""),
        "Push": (stream_out("Push"), body),
        "Read": (stream_in("Read"), read),
        "Load": (stream_out("Load"), loading),
    }


METHODS = (
    "Describe",
    "Fence",
    "Cut",
    "Release",
    "Expect",
    "Enter",
    "OpenLane",
    "Pull",
    "Push",
    "Read",
    "Load",
)
GOOD = ((TOKEN_KEY, TOKEN),)
STRANGERS = {
    "none": (),
    "empty": ((TOKEN_KEY, ""),),
    "wrong": ((TOKEN_KEY, "guess"),),
    "prefix": ((TOKEN_KEY, TOKEN[:-1]),),
    "other case": ((TOKEN_KEY, TOKEN.upper()),),
    "other key": (("token", TOKEN),),
}


def status_of(call, request):
    with pytest.raises(grpc.RpcError) as refused:
        call(request)
    return refused.value.code()


@pytest.fixture
def busy_service(loaded):
    """A cluster of one shard with two pushes settled and a cut kept."""
    cluster = loaded(1)
    client = cluster.client()
    for sequence in range(2):
        push_ones(client, 0, sequence)
    client.cut("kept", wait_s=0)
    return cluster


def test_every_method_of_the_protocol_is_tried_below(busy_service):
    control = [m.name for m in pb.DESCRIPTOR.services_by_name["ParameterServer"].methods]
    bytes_half = lane.bytes_handlers(busy_service.services[0])
    assert {*METHODS} == {*control, *(m.split("/")[-1] for m in bytes_half._method_handlers)}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_without_the_token_nothing_is_done(busy_service, stranger):
    (service,) = busy_service.services
    before = held(service)
    calls = raw_calls(busy_service.addresses[0], STRANGERS[stranger])
    for method in METHODS:
        assert status_of(*calls[method]) is grpc.StatusCode.UNAUTHENTICATED, method
    assert_holds_the_same(before, held(service))
    assert len(service._spare_staging) == 1  # none was taken for the stranger's push
    assert_at(busy_service.client(), [2])


def test_with_the_token_the_same_calls_are_carried_out(busy_service):
    """Or else the test above would show nothing."""
    calls = raw_calls(busy_service.addresses[0], GOOD)
    last = ("Read", "Release", "Fence")
    for method in (*(m for m in METHODS if m not in (*last, "Load")), *last):
        call, request = calls[method]
        call(request)
    assert busy_service.services[0].status().clocks.updates == 3
    assert status_of(*calls["Load"]) is grpc.StatusCode.INVALID_ARGUMENT  # it comes too late


def test_a_client_with_a_wrong_token_is_told_at_once(busy_service):
    fake = FakeTime()
    shard = ShardClient(busy_service.addresses[0], "guess", PATIENT, fake.clock, fake.sleep)
    with pytest.raises(grpc.RpcError, match=TOKEN_KEY) as refused:
        shard.pull(torch.zeros(352), torch.zeros(NUM_STATISTICS))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert fake.pauses_s == []
    shard.close()


def test_a_server_without_a_token_is_a_bug(busy_service):
    with pytest.raises(AssertionError, match="token"):
        ShardServer(busy_service.services[0], HOST, "", 1)


GARBAGE = b"\xff\xff\xff"
PUSH_HEADER = pb.PushHeader(worker=1, num_samples=1).SerializeToString()
BODY = bytes(4 * (352 + NUM_STATISTICS))

MALFORMED_PUSHES = {
    "empty": [],
    "garbage": [GARBAGE],
    "garbage and a body": [GARBAGE, BODY],
    "header only": [PUSH_HEADER],
    "short by a byte": [PUSH_HEADER, BODY[1:]],
    "short by a vector": [PUSH_HEADER, BODY[: 4 * 352]],
    "long by a byte": [PUSH_HEADER, BODY + b"\0"],
    "long by a message": [PUSH_HEADER, BODY, BODY],
    "negative sequence": [pb.PushHeader(worker=1, sequence=-1).SerializeToString(), BODY],
    "negative samples": [pb.PushHeader(worker=1, num_samples=-1).SerializeToString(), BODY],
}


def load_header(**numels):
    numels = {
        "parameters": 352,
        "statistics": NUM_STATISTICS,
        "ema": 352,
        "ema_statistics": NUM_STATISTICS,
        **numels,
    }
    vectors = [pb.Vector(name=n, numel=numel) for n, numel in numels.items() if numel >= 0]
    return pb.StateHeader(clocks=pb.Clocks(updates=9), vectors=vectors).SerializeToString()


MALFORMED_LOADS = {
    "empty": [],
    "garbage": [GARBAGE],
    "header only": [load_header()],
    "short by a byte": [load_header(), BODY, BODY[1:]],
    "long by a byte": [load_header(), BODY, BODY, b"\0"],
    "another size": [load_header(ema=336), BODY, BODY[64:]],
    "a vector missing": [load_header(ema=-1), BODY, BODY[4 * 352 :]],
    "a vector too many": [load_header(**{"slot.momentum": 1}), BODY, BODY, b"\0\0\0\0"],
    "huge": [load_header(ema=1 << 50)],
}

MALFORMED = (
    *(("Push", name, request) for name, request in MALFORMED_PUSHES.items()),
    *(("Load", name, request) for name, request in MALFORMED_LOADS.items()),
    ("Read", "garbage", GARBAGE),
    ("Cut", "unknown vector", pb.CutRequest(name="new", vectors=["emu"])),
    ("Cut", "negative wait", pb.CutRequest(name="new", version=99, wait_s=-1)),
    ("Cut", "endless wait", pb.CutRequest(name="new", version=99, wait_s=float("inf"))),
    ("Cut", "no wait", pb.CutRequest(name="new", version=99, wait_s=float("nan"))),
)


@pytest.mark.parametrize(
    ("method", "request_"),
    [pytest.param(m, request, id=f"{m}: {name}") for m, name, request in MALFORMED],
)
def test_malformed_calls_are_refused_and_change_nothing(busy_service, method, request_):
    (service,) = busy_service.services
    before = held(service)
    call, _ = raw_calls(busy_service.addresses[0], GOOD)[method]
    assert status_of(call, request_) is grpc.StatusCode.INVALID_ARGUMENT
    assert_holds_the_same(before, held(service))
    client = busy_service.client()
    push_ones(client, 0, 2)
    push_ones(client, 1, 0)
    assert_at(client, [4])
    assert len(service._spare_staging) == 1


def test_a_repeated_push_whose_receipt_is_forgotten_is_refused(loaded):
    client = loaded(1).client()
    for sequence in range(20):
        push_ones(client, 0, sequence)
    with pytest.raises(grpc.RpcError, match="push 0 of worker 0, incarnation 0") as refused:
        push_ones(client, 0, 0)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_at(client, [20])


@pytest.mark.parametrize("method", METHODS[:-1])
def test_before_load_there_is_nothing_to_serve(start, method):
    """FAILED_PRECONDITION; there is no copy to read, and none to release."""
    cluster = start(1)
    call, request = raw_calls(cluster.addresses[0], GOOD)[method]
    if method == "Release":
        assert call(request) == pb.ReleaseReply()
    else:
        missing = grpc.StatusCode.NOT_FOUND
        code = missing if method == "Read" else grpc.StatusCode.FAILED_PRECONDITION
        assert status_of(call, request) is code
    cluster.load()
    push_ones(cluster.client(), 0, 0)
    assert_at(cluster.client(), [1])


def test_vectors_of_another_layout_are_a_bug(loaded):
    """16 parameters that pass for statistics fill the same number of bytes."""
    (shard,) = loaded(1).client().shards
    with pytest.raises(AssertionError, match="layout"):
        shard.pull(torch.zeros(336), torch.zeros(NUM_STATISTICS + 16))
