"""Processes that are killed, or stand still, in the middle of a call in the tcp or shm lane."""

import multiprocessing
import os
import threading
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch
from lane_cluster import (
    HASTY,
    HOST,
    PATIENT,
    PULL,
    TOKEN,
    admitted,
    assert_at,
    assert_whole,
    config_of,
    held,
    layout_of,
    pull,
    push_frame,
    push_ones,
    push_shared_ones,
    wire_to,
)
from waiting import DEADLINE_S, background, eventually

from protos import parameter_server_pb2 as pb
from ps.client import ModelState, ParameterClient, RetryPolicy, ShardUnavailable
from ps.lanes import calling
from ps.lanes.lane import LaneError, LaneSettings
from ps.lanes.memory_wire import MemoryWire
from ps.server import ShardServer
from ps.service import ShardService
from ps.shard import initial_state

SPAWN = multiprocessing.get_context("spawn")
LAYOUT = layout_of(1, 300_000)
LARGE = layout_of(1, 12_000_000)
"""Copies take long enough to be under way at any time."""


@pytest.fixture(params=["shm", "tcp"])
def lane(request):
    return request.param


class Process:
    """Another process that does `work(line, *arguments)`, and may be killed."""

    def __init__(self, work, *arguments) -> None:
        self.line, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self):
        self.process.kill()  # SIGKILL
        self.process.join(DEADLINE_S)


@pytest.fixture
def spawn():
    processes = []

    def start(work, *arguments):
        processes.append(Process(work, *arguments))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def work_on(line, address, lane, caller=None):
    """A worker that pulls and pushes until it is killed."""
    settings = LaneSettings(choice=lane)
    client = ParameterClient([address], LAYOUT, TOKEN, PATIENT, settings, identity=caller)
    for sequence in count():
        pull(client)
        push_shared_ones(client, 0, sequence)
        line.send(sequence)


def serve(line):
    """A shard that is served until its process is killed."""
    server = ShardServer(ShardService(config_of(LAYOUT.shards[0])), HOST, TOKEN, 4)
    server.start()
    line.send((server.address, server._gate._offer.shm_socket))
    threading.Event().wait()


def serve_until_told(line):
    """A shard whose process ends in the midst of calls: the server's end waits for none."""
    server = ShardServer(ShardService(config_of(LARGE.shards[0])), HOST, TOKEN, 8)
    server.start()
    line.send(server.address)
    line.recv()
    server._server.stop(grace=0).wait()
    server._gate.stop(wait_s=0)  # so that threads which still work are the last to hold the shard


def stall(line, lane, what, caller):
    """Half of a call, and then nothing. Asks for a ticket when it has come up."""
    line.send("up")

    class Gate:
        _offer = pb.OpenLaneReply.FromString(line.recv())

    wire = wire_to(Gate, lane, caller)
    wire.send_bytes(Gate._offer.ticket)
    wire.receive(pb.LaneAnswer)
    if what == "pull":
        wire.send_bytes(PULL)
        wire.receive(pb.LaneAnswer)
    else:
        ranges = LAYOUT.shards[0]
        wire.send_bytes(push_frame(ranges.parameters.numel, ranges.statistics.numel))
        wire.send_bytes(bytes(1000))
    line.send("half done")
    threading.Event().wait()


def stall_at(spawn, cluster, lane, what):
    process = spawn(stall, lane, what, cluster.caller)
    assert process.line.recv() == "up"
    process.line.send(cluster.gate.offer().SerializeToString())
    assert process.line.recv() == "half done"
    return process


def test_a_reader_killed_while_it_holds_a_pin_gives_it_back(loaded, spawn):
    cluster = loaded(LAYOUT)
    (service,), client, sequences = cluster.services, cluster.client("shm"), count()
    for _ in range(2):
        reader = stall_at(spawn, cluster, "shm", "pull")
        assert service.in_use["pins"] == 1
        for _ in range(3):  # updates go on meanwhile
            push_shared_ones(client, 0, next(sequences))
        # The pinned one, the newest and the next: were a pin lost, there would be more.
        assert client.describe()[0].num_buffers == 3
        reader.kill()
        eventually(lambda: service.in_use["pins"] == 0)
    assert_at(client, [6])
    assert client.describe()[0].num_buffers == 3


def test_a_reader_killed_in_the_middle_of_a_pull_over_tcp_gives_its_pin_back(loaded, spawn):
    cluster = loaded(LARGE)
    reader = stall_at(spawn, cluster, "tcp", "pull")
    eventually(lambda: cluster.services[0].in_use["pins"] == 1)
    reader.kill()
    eventually(lambda: cluster.services[0].in_use["pins"] == 0)
    assert_at(cluster.client("tcp"), [0])


def test_a_worker_killed_in_the_middle_of_a_push_leaves_no_trace(loaded, spawn):
    cluster = loaded(LAYOUT)
    (service,), client = cluster.services, cluster.client("tcp")
    worker = stall_at(spawn, cluster, "tcp", "push")
    eventually(lambda: service.in_use["staging"] == 1)
    push_shared_ones(client, 0, 0)
    worker.kill()
    eventually(lambda: service.in_use["staging"] == 0)
    assert held(service)[0].last_sequences == {0: {0: 0}}
    assert_at(client, [1])


def segments_named_in(folder):
    return [name for name in os.listdir(folder) if "asynception" in name]


def unix_sockets():
    return Path("/proc/net/unix").read_text()


def test_a_worker_killed_at_work_leaves_nothing_behind(loaded, spawn, lane):
    cluster = loaded(LAYOUT)
    (service,) = cluster.services
    num_fds = len(os.listdir("/proc/self/fd"))
    worker = spawn(work_on, cluster.addresses[0], lane, cluster.caller)
    for _ in range(5):
        worker.line.recv()
    worker.kill()
    eventually(lambda: cluster.gate.num_connections == 0)
    assert not any(service.in_use.values())
    version = service.status().clocks.updates
    assert version >= 5
    client = cluster.client(lane)
    assert_at(client, [version])
    client.close()
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= num_fds + 8)  # spare buffers, gRPC's
    assert not segments_named_in("/dev/shm")


@pytest.mark.long
def test_everything_killed_at_once_leaves_nothing_behind(spawn, lane):
    """And a new start has nothing to clear away."""
    for _ in range(2):
        server = spawn(serve)
        address, name = server.line.recv()
        state = initial_state(
            config_of(LAYOUT.shards[0]).rule, torch.zeros(300_000), torch.zeros(64)
        )
        client = ParameterClient([address], LAYOUT, TOKEN, HASTY, LaneSettings(choice=lane))
        client.load(ModelState(state.clocks, state.vectors, {}))
        assert client.connect() == [lane]
        assert name in unix_sockets()
        worker = spawn(work_on, address, lane)
        worker.line.recv()
        server.process.kill()
        worker.kill()
        server.kill()
        with pytest.raises(ShardUnavailable, match=address):
            pull(client)
        client.close()
        assert name not in unix_sockets()
        assert not segments_named_in("/dev/shm")


def test_a_server_s_process_ends_in_peace_while_its_lanes_are_at_work(spawn):
    server = spawn(serve_until_told)
    address, began = server.line.recv(), threading.Barrier(4)
    vectors = torch.zeros(LARGE.num_parameters), torch.zeros(LARGE.num_statistics)
    state = initial_state(config_of(LARGE.shards[0]).rule, *vectors)
    clients = [
        ParameterClient([address], LARGE, TOKEN, HASTY, LaneSettings(choice="tcp"))
        for _ in range(3)
    ]
    clients[0].load(ModelState(state.clocks, state.vectors, {}))

    def work(worker, client):
        for sequence in count():
            push_ones(client, worker, sequence)
            if not sequence:
                began.wait(DEADLINE_S)

    working = [background(lambda each=each: work(*each)) for each in enumerate(clients)]
    began.wait(DEADLINE_S)
    server.line.send("end")
    for each in working:
        with pytest.raises(ShardUnavailable):
            each.result(DEADLINE_S)
    server.process.join(DEADLINE_S)
    assert server.process.exitcode == 0
    for client in clients:
        client.close()


def test_a_reader_that_is_too_late_pulls_again(loaded, monkeypatch):
    """It stands still between the answer and its copy, until its pin is gone and overwritten."""
    cluster = loaded(LAYOUT)
    (service,) = cluster.services
    pusher = cluster.client("shm")
    late, reader = [], threading.get_ident()
    views = MemoryWire.views

    def stand_still(self, memory, numels, *dtypes):
        seen = views(self, memory, numels, *dtypes)
        if threading.get_ident() == reader and not late:
            eventually(lambda: service.in_use["pins"] == 0)
            for sequence in range(4):
                background(lambda s=sequence: push_shared_ones(pusher, 0, s)).result(DEADLINE_S)
            late.append(seen[0].clone())
        return seen

    monkeypatch.setattr(MemoryWire, "views", stand_still)
    client = cluster.client("shm")
    client.connect()  # a lane that never worked is given up after two failures
    retry = RetryPolicy(attempt_s=0.5, deadline_s=DEADLINE_S, backoff_s=0.01)
    monkeypatch.setattr(client.shards[0]._retrying, "policy", retry)
    versions, parameters, statistics = pull(client)
    assert (late[0] != 0).any(), "what it was shown first has been written over"
    assert versions == [4]
    assert_whole(cluster.layout, versions, parameters, statistics)


def test_a_pin_goes_only_after_the_connection_of_its_reader(loaded, monkeypatch):
    """Or a reader could believe in a copy that an update has written over."""
    cluster, ended = loaded(LAYOUT), []
    (service,) = cluster.services
    with admitted(cluster.gate, "shm") as wire:
        real = service.pinned

        @contextmanager
        def watched(worker=None):
            with real(worker) as snapshot:
                try:
                    yield snapshot
                finally:
                    with pytest.raises(LaneError, match="Broken pipe"):
                        wire.send(pb.LaneCall(released=True))
                    ended.append(True)

        monkeypatch.setattr(service, "pinned", watched)
        wire.send(pb.LaneCall(timeout_s=0.2, pull=pb.PullRequest()))
        eventually(lambda: cluster.gate.num_connections == 0)
    assert ended == [True]


def test_a_push_given_up_and_sent_again_is_applied_once(loaded, lane, monkeypatch):
    """The first attempt stays under way at the server, past its deadline."""
    cluster = loaded(LAYOUT)
    (service,) = cluster.services
    client = cluster.client(lane)
    client.connect()  # a lane that never worked is given up after two failures
    retry = RetryPolicy(attempt_s=0.3, deadline_s=DEADLINE_S, backoff_s=0.01)
    monkeypatch.setattr(client.shards[0]._retrying, "policy", retry)
    with service._lock:
        push = background(lambda: push_shared_ones(client, 0, 0))
        eventually(lambda: cluster.gate.num_connections >= 4)
    assert push.result(DEADLINE_S)[0].version == 0
    assert_at(client, [1])
    assert client.lanes == [lane]


def test_a_server_that_stands_still_is_given_up(loaded, lane, monkeypatch):
    """As a stopped process: connections are taken in by the kernel, and nobody answers."""
    cluster = loaded(LAYOUT)
    client = cluster.client(lane)
    push_shared_ones(client, 0, 0)
    with monkeypatch.context() as hasty:
        hasty.setattr(calling, "HANDSHAKE_S", 0.1)
        policy = RetryPolicy(attempt_s=0.5, deadline_s=1.0, backoff_s=0.01)
        hasty.setattr(client.shards[0]._retrying, "policy", policy)
        with cluster.services[0]._lock, pytest.raises(ShardUnavailable):
            push_shared_ones(client, 0, 1)
    eventually(lambda: cluster.services[0].status().clocks.updates == 2)
    assert push_shared_ones(cluster.client(lane), 0, 1)[0].version == 1
