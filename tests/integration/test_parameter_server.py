"""Whole clients against real shard servers over gRPC on 127.0.0.1, with what can go wrong there.

Shards run in this process, where a test can look inside, unless their death is the subject.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from itertools import count, islice, takewhile
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from lane_cluster import (
    HASTY,
    HOST,
    NUM_STATISTICS,
    PATIENT,
    STATISTICS,
    TOKEN,
    WatchedService,
    assert_at,
    assert_whole,
)
from waiting import DEADLINE_S, background, eventually

from model.flat import ALIGNMENT, Segment
from protos import parameter_server_pb2 as pb
from protos import parameter_server_pb2_grpc as pb_grpc
from ps.client import (
    ModelState,
    ParameterClient,
    RetryPolicy,
    ShardClient,
    ShardUnavailable,
)
from ps.consistency import Async
from ps.lanes import grpc as lane
from ps.lanes.grpc import SERVICE
from ps.lanes.stream import chunks
from ps.layout import Layout, plan_layout
from ps.messages import state_header
from ps.push import Push
from ps.receipts import Settled
from ps.rules import SGD, Ema, RMSprop
from ps.schedule import Clocks, Constant, Exponential, Horizon
from ps.server import TOKEN_KEY, ShardServer
from ps.service import ShardService
from ps.shard import (
    Outcome,
    Receipt,
    Shard,
    ShardConfig,
    ShardState,
    initial_state,
    vector_names,
)

ROOT = Path(__file__).parents[2]


def segments_of(num_parameters):
    """A bias and a kernel, of which the last has all but three quanta."""
    kernel = num_parameters - 3 * ALIGNMENT
    return (Segment("bias", (41,), 0, False), Segment("kernel", (kernel,), 3 * ALIGNMENT, True))


def shard_configs(layout: Layout, rule, schedule, max_staleness=None):
    horizon = Horizon(epoch_samples=100, num_workers=4)
    policy = Async(max_staleness=max_staleness)
    return [
        ShardConfig(ranges, rule, schedule, horizon, Ema(decay=0.9), policy)
        for ranges in layout.shards
    ]


class Cluster:
    """Shard servers, started and not yet loaded."""

    def __init__(
        self,
        num_shards,
        num_parameters=352,
        rule=SGD(),  # noqa: B008 (frozen)
        schedule=Constant(lr=1.0),  # noqa: B008
        max_staleness=None,
    ):
        self.num_parameters = num_parameters
        self.layout = plan_layout(segments_of(num_parameters), STATISTICS, num_shards)
        configs = shard_configs(self.layout, rule, schedule, max_staleness)
        self.services = [WatchedService(config) for config in configs]
        self.servers = [ShardServer(s, HOST, TOKEN, num_workers=8) for s in self.services]
        self.clients: list[ParameterClient] = []
        for server in self.servers:
            server.start()

    @property
    def addresses(self):
        return [server.address for server in self.servers]

    def client(self, retry=PATIENT):
        self.clients.append(ParameterClient(self.addresses, self.layout, TOKEN, retry))
        return self.clients[-1]

    def first_state(self, start=0.0):
        rule = self.services[0].config.rule
        parameters = torch.full((self.num_parameters,), start)
        state = initial_state(rule, parameters, torch.zeros(NUM_STATISTICS))
        return ModelState(state.clocks, state.vectors, {})

    def load(self, start=0.0):
        self.client().load(self.first_state(start))

    def close(self):
        for client in self.clients:
            client.close()
        for server in self.servers:
            server.stop()


@pytest.fixture
def start():
    """Starts clusters, and ends them with the test."""
    clusters = []

    def build(*arguments, **settings):
        clusters.append(Cluster(*arguments, **settings))
        return clusters[-1]

    yield build
    for cluster in clusters:
        cluster.close()


def room(cluster):
    return torch.full((cluster.num_parameters,), 99.0), torch.full((NUM_STATISTICS,), 99.0)


def push_ones(client, worker, sequence, pulled=None, incarnation=0, value=1.0):
    """Takes 1 from every parameter, with SGD and lr 1, and adds 1 to every statistic."""
    return client.push(
        worker,
        incarnation,
        sequence,
        pulled or [0] * len(client.shards),
        2,
        torch.full((client.layout.num_parameters,), value),
        torch.ones(client.layout.num_statistics),
    )


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


def push_to_one_shard(client, index, worker, sequence):
    ranges = client.layout.shards[index]
    gradient, delta = torch.ones(ranges.parameters.numel), torch.ones(ranges.statistics.numel)
    return client.shards[index].push(Push(worker, 0, sequence, 0, 2, gradient, delta))


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


@contextmanager
def pushers(cluster, num_workers):
    """Workers that push ones without pause until the block ends."""
    enough = threading.Event()

    def work(worker):
        client = cluster.client()
        sequences = takewhile(lambda _: not enough.is_set(), count())
        return sum(1 for sequence in sequences if push_ones(client, worker, sequence))

    futures = [background(lambda worker=worker: work(worker)) for worker in range(num_workers)]
    try:
        yield
    finally:
        enough.set()
        for future in futures:
            assert future.result(DEADLINE_S) > 0


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


# Pulls under fire


def test_pulls_under_fire_are_never_torn(loaded):
    """Of several messages each, so that many pushes land in the middle of every pull."""
    cluster = loaded(2, num_parameters=1_200_000)
    client, seen = cluster.client(), set()
    with pushers(cluster, 2):
        for _ in range(40):
            parameters, statistics = room(cluster)
            versions = client.pull(parameters, statistics)
            assert_whole(cluster.layout, versions, parameters, statistics)
            seen.update(versions)
        eventually(lambda: client.describe()[0].clocks.updates > 20)
    assert len(seen) > 5


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


# Death


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


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now_s, self.pauses_s = 0.0, []

    def clock(self):
        return self.now_s

    def sleep(self, pause_s):
        self.pauses_s.append(pause_s)
        self.now_s += pause_s


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


# What must be refused


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


def test_a_proxy_for_the_way_out_is_not_used_within_the_cluster(loaded, monkeypatch, dead_address):
    cluster = loaded(1)
    for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(variable, f"http://{dead_address}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert_at(cluster.client(HASTY), [0])
