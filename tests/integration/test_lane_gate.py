"""What a shard takes in over the tcp and shm lanes, and what it makes of the rest."""

import contextlib
import struct
import threading

import pytest
from lane_cluster import (
    NUM_PARAMETERS,
    NUM_STATISTICS,
    PULL,
    admitted,
    assert_at,
    assert_ended,
    assert_unharmed,
    connect,
    frame,
    held,
    layout_of,
    pull,
    push_frame,
    push_ones,
    wire_to,
)
from waiting import eventually

from protos import parameter_server_pb2 as pb
from ps.lanes import gate as gate_module
from ps.lanes import serving
from ps.lanes.frames import FRAME_NUM_BYTES, MAX_MESSAGE_NUM_BYTES
from ps.lanes.lane import LaneError
from ps.lanes.tickets import Tickets

BODY = bytes(4 * (NUM_PARAMETERS + NUM_STATISTICS))
BF16_BODY = bytes(2 * NUM_PARAMETERS + 4 * NUM_STATISTICS)


@pytest.fixture(params=["shm", "tcp"])
def lane(request):
    return request.param


# Tickets


def test_a_connection_without_a_ticket_is_closed_soon(loaded, lane, monkeypatch):
    cluster = loaded()
    before = held(cluster.services[0])
    with monkeypatch.context() as soon:  # the good ones below have more time
        soon.setattr(gate_module, "ADMISSION_S", 0.05)
        for start in (b"", b"\0", b"\0" * 31):
            wire = wire_to(cluster.gate, lane, cluster.caller)
            with contextlib.suppress(LaneError):  # it may be closed already
                wire.send_bytes(start)
            assert_ended(wire)
            wire.close()
    assert_unharmed(cluster, before)


@pytest.mark.parametrize("length", [32, 5000])
def test_a_guessed_ticket_lets_nobody_in(loaded, lane, length):
    cluster = loaded()
    before = held(cluster.services[0])
    cluster.gate.offer()
    wire = wire_to(cluster.gate, lane, cluster.caller)
    wire.send_bytes(b"\1" * length)
    assert_ended(wire)
    wire.close()
    assert_unharmed(cluster, before)


def test_a_ticket_is_good_for_one_connection(loaded, lane):
    cluster = loaded()
    ticket = cluster.gate.offer().ticket
    first, second = (
        wire_to(cluster.gate, lane, cluster.caller),
        wire_to(cluster.gate, lane, cluster.caller),
    )
    first.send_bytes(ticket)
    assert first.receive(pb.LaneAnswer).HasField("welcome")
    second.send_bytes(ticket)
    assert_ended(second)
    first.close()
    second.close()


def test_an_expired_ticket_lets_nobody_in(loaded, lane):
    now_s = [0.0]
    cluster = loaded()
    cluster.gate._tickets = Tickets(lambda: now_s[0])
    ticket = cluster.gate.offer().ticket
    now_s[0] = 10.0
    wire = wire_to(cluster.gate, lane, cluster.caller)
    wire.send_bytes(ticket)
    assert_ended(wire)
    wire.close()


# Frames


def raw_frame(length, message=b""):
    return (struct.pack("<I", length) + message).ljust(FRAME_NUM_BYTES, b"\0")


MALFORMED = {
    "an oversized message": raw_frame(MAX_MESSAGE_NUM_BYTES + 1),
    "the largest message": raw_frame(2**32 - 1),
    "an empty message": raw_frame(0),
    "garbage": raw_frame(3, b"\xff\xff\xff"),
    "nothing but garbage": b"\xff" * FRAME_NUM_BYTES,
    "an unknown call": frame(),
    "a release of nothing": frame(released=True),
    "no timeout": frame(pull=pb.PullRequest(), timeout_s=0),
    "a negative timeout": frame(pull=pb.PullRequest(), timeout_s=-1),
    "an endless timeout": frame(pull=pb.PullRequest(), timeout_s=float("inf")),
    "a timeout of NaN": frame(pull=pb.PullRequest(), timeout_s=float("nan")),
    "a longer push": push_frame(NUM_PARAMETERS + 16) + BODY + bytes(64),
    "a shorter push": push_frame(NUM_PARAMETERS - 16) + BODY[64:],
    "a push without lengths": push_frame(0, 0) + BODY,
    "a negative length": push_frame(-1, -1) + BODY,
    "an unknown dtype": push_frame(dtype=7) + BODY,
    "other lengths of one sum": push_frame(NUM_PARAMETERS - 16, NUM_STATISTICS + 16) + BODY,
}
SHORT = {
    "a frame without its padding": PULL.rstrip(b"\0"),
    "half a length": PULL[:2],
    "half a frame": PULL[:-2],
    "half a push": push_frame() + BODY[: len(BODY) // 2],
    "a push short by a byte": push_frame() + BODY[:-1],
    "bf16 short by a byte": push_frame(dtype=pb.BFLOAT16) + bytes(len(BF16_BODY) - 1),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_nonsense_ends_its_connection_and_nothing_else(loaded, lane, name, monkeypatch, caplog):
    monkeypatch.setattr(serving, "HANDSHAKE_S", 3600.0)  # not for want of patience
    cluster = loaded()
    push_ones(cluster.client(), 0, 0)
    before = held(cluster.services[0])
    with admitted(cluster.gate, lane, caller=cluster.caller) as wire:
        wire.send_bytes(MALFORMED[name])
        assert_ended(wire)
    assert_unharmed(cluster, before)
    assert "bug" not in caplog.text


@pytest.mark.parametrize("name", SHORT)
def test_a_connection_that_ends_too_early_leaves_no_trace(loaded, lane, name):
    cluster = loaded()
    before = held(cluster.services[0])
    with admitted(cluster.gate, lane, caller=cluster.caller) as wire:
        wire.send_bytes(SHORT[name])
    assert_unharmed(cluster, before)


@pytest.mark.parametrize("wait_s", [-1.0, float("nan"), float("inf"), 31.0])
def test_an_impossible_wait_is_refused_and_the_connection_goes_on(loaded, lane, wait_s):
    cluster = loaded()
    with admitted(cluster.gate, lane, caller=cluster.caller) as wire:
        wire.send_bytes(frame(pull=pb.PullRequest(at_least=9, wait_s=wait_s)))
        refusal = wire.receive(pb.LaneAnswer).refusal
        assert refusal.status == "INVALID_ARGUMENT"
        wire.send_bytes(PULL)
        assert wire.receive(pb.LaneAnswer).pull.num_parameters == NUM_PARAMETERS


# Peers that stall, and too many of them


def test_a_push_that_stalls_is_given_up_when_its_caller_does(loaded, lane):
    cluster = loaded()
    before = held(cluster.services[0])
    with admitted(cluster.gate, lane, caller=cluster.caller) as wire:
        body = BODY[:100] if lane == "tcp" else b""
        data = push_frame(timeout_s=0.2) if lane == "tcp" else push_frame()[:-1]
        wire.send_bytes(data + body)
        if lane == "shm":  # a frame that never ends: the server's own limit is longer
            wire.shutdown()
        else:
            eventually(lambda: cluster.services[0].ever_used["staging"] == 1)
            assert_ended(wire)
    assert_unharmed(cluster, before)


def test_a_reader_that_stalls_loses_its_pin_when_its_time_is_up(loaded, lane):
    """Over tcp it takes nothing off the socket; over shm it doesn't release what it pulled."""
    cluster = loaded(layout_of(1, 12_000_000))
    (service,) = cluster.services
    with admitted(cluster.gate, lane, caller=cluster.caller) as wire:
        num_before = service.ever_used["pins"]  # by the offer, which pins for a moment
        wire.send_bytes(frame(pull=pb.PullRequest(), timeout_s=1.0))
        eventually(lambda: service.ever_used["pins"] == num_before + 1)
        push_ones(cluster.client(), 0, 0)
        eventually(lambda: service.in_use["pins"] == 0)
    eventually(lambda: cluster.gate.num_connections == 0)
    assert_at(cluster.client(lane), [1])


def test_there_is_an_end_to_connections(loaded, lane):
    cluster = loaded()
    gate = cluster.gate
    gate._max_connections = 3
    wires = [wire_to(gate, lane, cluster.caller) for _ in range(3)]
    eventually(lambda: gate.num_connections == 3)
    with pytest.raises(LaneError), admitted(gate, lane, caller=cluster.caller):
        pass
    client = cluster.client("auto")
    assert_at(client, [0])  # another lane is left
    assert client.lanes == ["grpc"]
    for wire in wires:
        wire.close()
    eventually(lambda: gate.num_connections == 0)
    assert_at(cluster.client(lane), [0])


def num_threads_beside_pools():
    """A server's pool grows when a call comes before the thread of the last one is idle again."""
    return sum(not thread.name.startswith("shard_") for thread in threading.enumerate())


def test_no_thread_is_left_behind(loaded, lane):
    cluster = loaded()
    num_threads = num_threads_beside_pools()
    for sequence in range(20):
        client = cluster.client(lane)
        push_ones(client, 0, sequence)
        pull(client)
        client.close()
    eventually(lambda: cluster.gate.num_connections == 0)
    eventually(lambda: num_threads_beside_pools() <= num_threads + 2)  # gRPC's own


def test_stopping_ends_connections_and_closes_the_ports(loaded, lane):
    cluster = loaded()
    gate = cluster.gate
    with admitted(gate, lane, caller=cluster.caller) as wire:
        cluster.servers[0].stop()
        assert_ended(wire)
    eventually(lambda: gate.num_connections == 0)  # `stop` waits for their threads, but not long
    with pytest.raises(ConnectionRefusedError):
        connect(gate, lane)
