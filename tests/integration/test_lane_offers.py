"""Which lanes a server offers to whom, and the memory that peers show each other."""

import errno
import os
import socket

import pytest
import torch
from lane_cluster import (
    BFLOAT16,
    HASTY,
    HOST,
    NUM_PARAMETERS,
    NUM_STATISTICS,
    PULL,
    Cluster,
    admitted,
    assert_at,
    assert_unharmed,
    held,
    layout_of,
    push_frame,
    push_ones,
)
from waiting import DEADLINE_S, background, eventually

from model.errors import InputError
from protos import parameter_server_pb2 as pb
from ps.lanes import gate, memory_wire
from ps.lanes.lane import LaneError, LaneSettings
from ps.lanes.memory_wire import MAX_NEW_SEGMENTS
from ps.lanes.segment import shared_zeros
from ps.wire import AS_IS

BODY = bytes(4 * (NUM_PARAMETERS + NUM_STATISTICS))


@pytest.fixture(params=["shm", "tcp"])
def lane(request):
    return request.param


# Memory that is shown


def unsealed(num_bytes):
    fd = os.memfd_create("test")
    os.ftruncate(fd, num_bytes)
    return fd


@pytest.fixture
def shown(loaded, tmp_path):
    """Pushes with memory as the test has it: places, numbers of segments, descriptors."""
    cluster = loaded()
    before = held(cluster.services[0])
    vectors = [shared_zeros(NUM_PARAMETERS), shared_zeros(NUM_STATISTICS)]
    good = [memory_wire.segment_of(vector).fd for vector in vectors]
    num_fds = len(os.listdir("/proc/self/fd"))

    def push(places, numbers, fds):
        with admitted(cluster.gate, "shm") as wire:
            memory = pb.Memory(
                places=[pb.Place(segment=s, offset_num_bytes=o) for s, o in places],
                new_segments=numbers,
            )
            data = push_frame(memory=memory)
            if fds:
                socket.send_fds(wire._socket, [data], fds)
            else:
                wire.send_bytes(data)
            return wire.receive(pb.LaneAnswer)

    yield push, good
    assert_unharmed(cluster, before)
    assert vectors
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= num_fds)


BOTH = [(0, 0), (1, 0)]


@pytest.mark.parametrize(
    ("places", "numbers", "num_fds"),
    [
        (BOTH, [], 0),
        (BOTH, [0, 1], 0),
        (BOTH, [0, 1], 1),
        (BOTH, [0], 2),
        (BOTH, [0, 0], 2),
        (BOTH[:1], [0, 1], 2),
        ([*BOTH, (0, 0)], [0, 1], 2),
        ([], [0, 1], 2),
        ([(0, 4), (1, 0)], [0, 1], 2),
        ([(0, -4), (1, 0)], [0, 1], 2),
        ([(0, 2), (1, 0)], [0, 1], 2),
        ([(0, 1 << 40), (1, 0)], [0, 1], 2),
        ([(0, 0), (7, 0)], [0, 1], 2),
        (BOTH, list(range(MAX_NEW_SEGMENTS + 1)), MAX_NEW_SEGMENTS + 1),
    ],
)
def test_memory_that_is_not_there_ends_the_connection(shown, places, numbers, num_fds):
    push, good = shown
    with pytest.raises(LaneError):
        push(places, numbers, (good * MAX_NEW_SEGMENTS)[:num_fds])


@pytest.mark.parametrize("kind", ["a file", "a socket", "unsealed memory"])
def test_descriptors_of_something_else_end_the_connection(shown, kind, tmp_path):
    """A file, or memory without seals, could shrink under the server, which would die of it."""
    push, good = shown
    if kind == "a file":
        (tmp_path / "file").write_bytes(BODY)
        fd = os.open(tmp_path / "file", os.O_RDWR)
    elif kind == "a socket":
        fd = socket.socket().detach()
    else:
        fd = unsealed(len(BODY))
    try:
        with pytest.raises(LaneError):
            push(BOTH, [0, 1], [fd, good[1]])
    finally:
        os.close(fd)


def test_descriptors_that_nobody_asked_for_are_dropped(loaded):
    cluster = loaded()
    vector = shared_zeros(NUM_PARAMETERS)
    with admitted(cluster.gate, "shm") as wire:
        num_fds = len(os.listdir("/proc/self/fd"))
        for _ in range(MAX_NEW_SEGMENTS):
            fds = [memory_wire.segment_of(vector).fd] * 2
            socket.send_fds(wire._socket, [PULL], fds)
            assert wire.receive(pb.LaneAnswer).HasField("pull")
            wire.send(pb.LaneCall(released=True))
        assert len(os.listdir("/proc/self/fd")) <= num_fds + 3  # a buffer, and the last two


# Who may come, and where


def test_another_user_is_not_shown_memory(loaded, monkeypatch):
    cluster = loaded()
    monkeypatch.setattr(memory_wire.os, "geteuid", lambda: 12345)
    client = cluster.client("auto")
    assert_at(client, [0])
    assert client.lanes == ["tcp"]
    with pytest.raises(InputError, match=r'lanes.choice = "shm".*12345'):
        cluster.client("shm").connect()


@pytest.mark.parametrize(
    ("server", "client", "expected"),
    [
        ("tcp", "auto", "tcp"),
        ("shm", "auto", "shm"),
        ("grpc", "auto", "grpc"),
        ("shm", "grpc", "grpc"),
        ("tcp", "shm", None),
        ("grpc", "tcp", None),
        ("shm", "tcp", None),
    ],
)
def test_a_lane_that_the_server_does_not_offer(loaded, server, client, expected):
    cluster = loaded(layout_of(2), server_lanes=LaneSettings(choice=server))
    pair = cluster.client(client)
    if expected is None:
        with pytest.raises(InputError, match=f'lanes.choice = "{client}": .* offers no {client}'):
            pair.connect()
    else:
        assert pair.connect() == [expected] * 2
        push_ones(pair, 0, 0)
        assert_at(pair, [1, 1])


def test_a_shard_in_private_memory_offers_no_shm_lane(loaded):
    cluster = loaded(service_settings={"allocate": torch.empty}.items())
    client = cluster.client("auto")
    assert_at(client, [0])
    assert client.lanes == ["tcp"]


def test_a_worker_without_shared_memory_takes_another_lane(loaded, monkeypatch):
    cluster = loaded()
    monkeypatch.delattr(os, "memfd_create")
    client = cluster.client("auto")
    push_ones(client, 0, 0)
    assert_at(client, [1])
    assert client.lanes == ["tcp"]


@pytest.mark.parametrize("wire", [AS_IS, BFLOAT16], ids=["float32", "bfloat16"])
def test_a_worker_without_shared_memory_says_so_where_shm_is_forced(loaded, monkeypatch, wire):
    """At once, though its pulls worked: no retry mends it."""
    cluster = loaded()
    client = cluster.client("shm", wire=wire)
    assert_at(client, [0])
    before = held(cluster.services[0])
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(InputError, match=r'lanes.choice = "shm": .*no shared memory .*"auto"'):
        background(lambda: push_ones(client, 0, 0)).result(DEADLINE_S)
    client.close()
    monkeypatch.undo()
    assert_unharmed(cluster, before)


def test_ports_that_are_not_for_this_user_are_an_error(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(gate.socket, "create_server", refuse)
    with pytest.raises(InputError, match=r"lanes.port_range = \[80, 81\]: .*not for this user"):
        gate.listen(HOST, (80, 81))


def free_ports(number):
    """The first of so many ports in a row that were free just now."""
    for first in range(21_000, 30_000, number):
        sockets = [socket.socket() for _ in range(number)]
        try:
            for port, each in enumerate(sockets, first):
                each.bind((HOST, port))
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
        return first
    raise AssertionError("no free ports")


def test_servers_share_a_range_of_ports_until_it_is_full(start):
    first = free_ports(5)
    lanes = LaneSettings(port_range=(first, first + 4))
    cluster = start(layout_of(2), server_lanes=lanes)
    ports = {int(address.rpartition(":")[2]) for address in cluster.addresses}
    ports |= {server._gate._offer.tcp_port for server in cluster.servers}
    assert len(ports) == 4
    assert ports <= set(range(first, first + 5))
    cluster.load()
    assert_at(cluster.client("tcp"), [0, 0])
    with pytest.raises(InputError, match=rf"lanes.port_range = \[{first}, {first + 4}\]: all"):
        Cluster(layout_of(1), server_lanes=lanes)


def test_a_range_of_ports_that_is_taken_is_an_error(start):
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"lanes.port_range = \[{port}, {port}\]"):
            start(server_lanes=LaneSettings(port_range=(port, port)))


def test_a_forced_lane_that_worked_before_is_tried_until_the_deadline(loaded, lane):
    """Not an error of input any more: the connection's end is the network's fault."""
    cluster = loaded()
    client = cluster.client(lane, HASTY)
    push_ones(client, 0, 0)
    cluster.gate.stop()
    with pytest.raises(Exception, match="gave no answer") as failed:
        background(lambda: push_ones(client, 0, 1)).result(DEADLINE_S)
    assert not isinstance(failed.value, InputError)
