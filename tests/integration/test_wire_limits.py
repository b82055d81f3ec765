"""Limits of what callers may hold and send over gRPC; those of the lanes: test_lane_gate.py."""

import contextlib
import gc
import threading

import grpc
import pytest
from lane_cluster import (
    TOKEN,
    assert_at,
    assert_holds_the_same,
    held,
    layout_of,
    push_ones,
)
from waiting import DEADLINE_S, eventually

from protos import parameter_server_pb2 as pb
from ps.server import CONNECTIONS_PER_CALLER, SPARE_THREADS, TOKEN_KEY

NUM_WORKERS = 2
METADATA = ((TOKEN_KEY, TOKEN),)
NUM_CALLS = 500
DESCRIBE = "/asynception.ParameterServer/Describe"


@pytest.fixture
def channel(loaded):
    """A cluster of one shard for two workers, and a channel to it."""
    cluster = loaded(layout_of(1, 12_000_000), num_workers=NUM_WORKERS)
    with grpc.insecure_channel(cluster.addresses[0]) as channel:
        yield cluster, channel


def test_strangers_who_never_send_their_message_hold_no_thread(channel):
    cluster, channel = channel
    end = threading.Event()

    def unsent():
        end.wait(DEADLINE_S)
        yield b""

    call = channel.stream_unary(DESCRIBE, None, None)
    number = CONNECTIONS_PER_CALLER * (NUM_WORKERS + SPARE_THREADS)
    calls = [call.future(unsent(), timeout=DEADLINE_S) for _ in range(number)]
    try:
        assert_at(cluster.client("grpc"), [0])
        assert {each.code() for each in calls} == {grpc.StatusCode.UNAUTHENTICATED}
    finally:
        end.set()
    (status,) = cluster.client("grpc").describe()
    assert status.unauthenticated == number


def test_a_message_that_is_too_long_is_refused_unread(channel):
    cluster, channel = channel
    before = held(cluster.services[0])
    release = channel.unary_unary("/asynception.ParameterServer/Release", None, None)
    long = pb.ReleaseRequest(name="x" * (5 << 20)).SerializeToString()
    with pytest.raises(grpc.RpcError) as refused:
        release(long, metadata=METADATA, timeout=DEADLINE_S)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    push = channel.stream_unary("/asynception.Bytes/Push", None, None)
    with pytest.raises(grpc.RpcError) as refused:
        push(iter([long]), metadata=METADATA, timeout=DEADLINE_S)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_holds_the_same(before, cluster.services[0])


def begun(call):
    """A stream that has brought its first message in time; `call(timeout_s)` begins one."""
    for timeout_s in (1.0, 4.0, 16.0):  # the machine may do other work
        stream = call(timeout_s)
        with contextlib.suppress(grpc.RpcError):
            next(stream)
            return stream
    raise TimeoutError("no stream began")


def test_a_reader_that_stops_reading_loses_its_pin_when_its_time_is_up(channel):
    cluster, channel = channel
    (service,) = cluster.services
    pull = channel.unary_stream("/asynception.Bytes/Pull", None, None)
    stream = begun(lambda s: pull(pb.PullRequest().SerializeToString(), s, METADATA))
    assert service.ever_used["pins"] >= 1
    push_ones(cluster.client(), 0, 0)
    eventually(lambda: service.in_use["pins"] == 0)
    assert stream.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert_at(cluster.client(), [1])


def test_a_pull_without_a_deadline_is_refused(channel):
    """It could hold its version for ever."""
    cluster, channel = channel
    pull = channel.unary_stream("/asynception.Bytes/Pull", None, None)
    with pytest.raises(grpc.RpcError, match="without a deadline") as refused:
        list(pull(pb.PullRequest().SerializeToString(), metadata=METADATA))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert cluster.services[0].in_use["pins"] == 0


def test_calls_that_can_not_be_decoded_are_answered_and_forgotten(channel):
    """gRPC's own decoding keeps each of them for ever."""
    cluster, channel = channel
    before = held(cluster.services[0])
    names = [method.name for method in pb.DESCRIPTOR.services_by_name["ParameterServer"].methods]
    assert "Fence" in names

    def refuse(name):
        call = channel.unary_unary(f"/asynception.ParameterServer/{name}", None, None)
        with pytest.raises(grpc.RpcError) as refused:
            call(b"\xff" * 11, metadata=METADATA, timeout=DEADLINE_S)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    def num_objects():
        gc.collect()
        return len(gc.get_objects())

    for name in names:
        refuse(name)
    num_before = num_objects()
    for _ in range(NUM_CALLS):
        refuse("Fence")
    eventually(lambda: num_objects() - num_before < NUM_CALLS)
    assert_holds_the_same(before, cluster.services[0])
