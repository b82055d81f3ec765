"""Workers and servers that die in the middle of a call, and servers that never answer."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch
from lane_cluster import (
    HASTY,
    HOST,
    NUM_STATISTICS,
    STATISTICS,
    TOKEN,
    assert_at,
)
from service_cluster import (
    FakeTime,
    push_ones,
    push_to_one_shard,
    room,
    segments_of,
    shard_configs,
    starting,
)
from waiting import DEADLINE_S, background, eventually

from ps.client import (
    ParameterClient,
    RetryPolicy,
    ShardClient,
    ShardUnavailable,
)
from ps.lanes import grpc as lane
from ps.lanes.grpc import SERVICE
from ps.layout import plan_layout
from ps.push import Push
from ps.rules import SGD
from ps.schedule import Clocks, Constant
from ps.server import TOKEN_KEY, ShardServer
from ps.service import ShardService
from ps.shard import (
    ShardState,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start():
    with starting() as start:
        yield start


# A worker that gets half of a call done and then waits to be killed; it needs no torch.
HALF_A_CALL = f"""
import sys, threading, grpc
from protos import parameter_server_pb2 as pb
what, address, token, num_bytes = sys.argv[1:]
channel = grpc.insecure_channel(address)
metadata = (("{TOKEN_KEY}", token),)

def pause():
    print("half done", flush=True)
    threading.Event().wait()

def half_a_push():
    yield pb.PushHeader(worker=6, num_samples=1).SerializeToString()
    yield b"\\1" * (int(num_bytes) // 4)
    yield b"\\1" * (int(num_bytes) // 4)
    pause()

if what == "push":
    channel.stream_unary("/{SERVICE}/Push", None, None)(half_a_push(), 600, metadata)
else:
    messages = channel.unary_stream("/{SERVICE}/Pull", None, None)(b"", 600, metadata)
    next(messages), next(messages)
    pause()
"""


@contextmanager
def half_a_call(cluster, what):
    """A process in the middle of a pull or push, killed at the end of the block."""
    num_bytes = 4 * (cluster.num_parameters + NUM_STATISTICS)
    arguments = [what, cluster.addresses[0], TOKEN, str(num_bytes)]
    process = subprocess.Popen(
        [sys.executable, "-c", HALF_A_CALL, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "half done\n"
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_S)
        process.stdout.close()


def test_a_worker_killed_in_the_middle_of_a_push_leaves_no_trace(loaded, monkeypatch):
    arrived, real_fill = threading.Event(), lane.fill

    def watched_fill(vectors, messages):
        def watched():
            for message in messages:
                yield message
                arrived.set()  # the message is in its place, and the next one is asked for

        real_fill(vectors, watched())

    cluster = loaded(1, num_parameters=1_000_000)
    (service,), client = cluster.services, cluster.client()
    monkeypatch.setattr(lane, "fill", watched_fill)
    with half_a_call(cluster, "push"):
        assert arrived.wait(DEADLINE_S)
        assert service.in_use["staging"] == 1
        push_ones(client, 0, 0)  # others go on meanwhile
    eventually(lambda: service.in_use["staging"] == 0)
    assert client.describe()[0].last_sequences == {0: {0: 0}}
    assert_at(client, [1])
    push_ones(client, 0, 1)
    push_ones(client, 6, 0)
    assert_at(client, [3])
    assert len(service._spare_staging) == 2


def test_workers_killed_in_the_middle_of_a_pull_give_their_pins_back(start, monkeypatch):
    """The server goes on with a pull only when gRPC has seen the worker's end."""
    whole, num_killed = lane._ServingHalf.pull, 3
    calls = count()

    def pull(self, request, context):
        ended = threading.Event()
        assert context.add_callback(ended.set)
        stalls = next(calls) < num_killed
        for number, message in enumerate(whole(self, request, context)):
            yield message
            if stalls and number == 1:
                assert ended.wait(DEADLINE_S)

    monkeypatch.setattr(lane._ServingHalf, "pull", pull)
    cluster = start(1, num_parameters=1_000_000)
    cluster.load()
    (service,), client, sequences = cluster.services, cluster.client(), count()
    for _ in range(num_killed):
        with half_a_call(cluster, "pull"):
            for _ in range(3):  # updates go on meanwhile
                push_ones(client, 0, next(sequences))
            # The pinned one, the newest and the next: were a pin lost, there would be more.
            assert client.describe()[0].num_buffers == 3
        eventually(lambda: service.in_use["pins"] == 0)
    assert_at(client, [3 * num_killed])


def serve_in_process(config, line):
    """A shard server in a process of its own, which lives until it is killed."""
    server = ShardServer(ShardService(config), HOST, TOKEN, num_workers=4)
    server.start()
    line.send(server.address)
    threading.Event().wait()


@pytest.fixture
def mortal():
    """A shard server of a process that may be killed: (address, process)."""
    context = multiprocessing.get_context("spawn")
    layout = plan_layout(segments_of(352), STATISTICS, 2)
    config = shard_configs(layout, SGD(), Constant(lr=1.0))[0]
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_in_process, args=(config, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its early death ends the wait
    yield ours.recv(), process
    process.kill()
    process.join(DEADLINE_S)


def test_a_killed_server_is_reported_and_the_others_go_on(start, mortal):
    """Shard 0 dies by SIGKILL while a worker pulls and pushes without pause."""
    address, process = mortal
    cluster = start(2)
    addresses = [address, cluster.addresses[1]]
    client = ParameterClient(addresses, cluster.layout, TOKEN, HASTY)
    cluster.clients.append(client)
    client.load(cluster.first_state())
    under_way = threading.Event()

    def work():
        parameters, statistics = room(cluster)
        for sequence in count():
            client.pull(parameters, statistics)
            push_ones(client, 0, sequence)
            under_way.set()

    worker = background(work)
    assert under_way.wait(DEADLINE_S)
    process.kill()
    with pytest.raises(ShardUnavailable, match=address):
        worker.result(DEADLINE_S)
    alive = client.shards[1]
    version = alive.describe().clocks.updates
    push_to_one_shard(client, 1, worker=1, sequence=0)
    assert alive.describe().clocks.updates == version + 1


@pytest.fixture
def dead_address():
    """An address at which nobody listens, and nobody else can: it is bound."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        yield f"{HOST}:{taken.getsockname()[1]}"


def test_a_dead_server_is_tried_until_the_deadline(dead_address):
    fake = FakeTime()
    retry = RetryPolicy(attempt_s=DEADLINE_S, deadline_s=30, backoff_s=0.5)
    shard = ShardClient(dead_address, TOKEN, retry, fake.clock, fake.sleep)
    with pytest.raises(ShardUnavailable, match=f"{dead_address} gave no answer in 30 s"):
        shard.describe()
    # At 0.5, 1.5, 3.5 and 7.5 s, then every 5 s; one at 32.5 s would be too late.
    assert fake.pauses_s == [0.5, 1, 2, 4, 5, 5, 5, 5]
    shard.close()


def calls_of(shard: ShardClient):
    parameters, statistics = torch.zeros(16), torch.zeros(16)
    state = ShardState(Clocks(), {"parameters": parameters})
    return {
        "pull": lambda: shard.pull(parameters, statistics),
        "push": lambda: shard.push(Push(0, 0, 0, 0, 1, parameters, statistics)),
        "describe": shard.describe,
        "fence": lambda: shard.fence(0, 1),
        "cut": lambda: shard.cut("copy", 0, 0.0, ()),
        "read": lambda: shard.read("copy", lambda name, numel: torch.zeros(numel)),
        "release": lambda: shard.release("copy"),
        "expect": lambda: shard.expect({0}, 1),
        "load": lambda: shard.load(state),
    }


CALLS = ("pull", "push", "describe", "fence", "cut", "read", "release", "expect", "load")


@pytest.mark.parametrize("call", CALLS)
def test_every_call_to_a_dead_server_ends(dead_address, call):
    shard = ShardClient(dead_address, TOKEN, HASTY)
    with pytest.raises(ShardUnavailable):
        calls_of(shard)[call]()
    shard.close()


def test_a_server_that_accepts_and_says_nothing_is_given_up():
    """As a stopped process or a cut cable: only the deadline of an attempt ends the call."""
    with socket.create_server((HOST, 0)) as silent:
        retry = RetryPolicy(attempt_s=0.05, deadline_s=0.1, backoff_s=0.01)
        shard = ShardClient(f"{HOST}:{silent.getsockname()[1]}", TOKEN, retry)
        with pytest.raises(ShardUnavailable):
            shard.describe()
        shard.close()


def test_an_error_is_raised_only_when_no_shard_uses_the_callers_vectors_any_more(loaded):
    """Shard 0 is gone, and shard 1 is slow: its thread still reads the gradient."""
    cluster = loaded(2)
    cluster.servers[0].stop()
    client = cluster.client(HASTY)
    with cluster.services[1]._lock:
        push = background(lambda: push_ones(client, 0, 0))
        with pytest.raises(TimeoutError):
            push.result(timeout=1.0)
    with pytest.raises(ShardUnavailable):
        push.result(DEADLINE_S)
    assert cluster.services[1].status().clocks.updates == 1


def test_a_proxy_for_the_way_out_is_not_used_within_the_cluster(loaded, monkeypatch, dead_address):
    cluster = loaded(1)
    for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(variable, f"http://{dead_address}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert_at(cluster.client(HASTY), [0])
