"""Shards with standbys over real gRPC and lanes: deaths, promotions, seeding, and strangers."""

import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager

import grpc
import pytest
import torch
from lane_cluster import HOST, PATIENT, TOKEN, config_of, layout_of
from waiting import DEADLINE_S, background, eventually

from protos import parameter_server_pb2 as pb
from ps.authority import new_identities
from ps.client import ModelState, ParameterClient, RetryPolicy
from ps.lanes.lane import LaneSettings
from ps.push import Order
from ps.receipts import Outcome
from ps.replicated import ReplicatedService
from ps.replication import ReplicationClient, StandbyLink, add_replication
from ps.retry import code_of
from ps.rules import Momentum
from ps.schedule import Clocks
from ps.server import ShardServer
from ps.service import ShardService
from ps.shard import initial_state

NUM_WORKERS = 3
QUICK = RetryPolicy(attempt_s=DEADLINE_S, deadline_s=DEADLINE_S, backoff_s=0.01)
CHECK_EVERY = 3
LAYOUT = layout_of()
CONFIG = config_of(LAYOUT.shards[0], rule=Momentum())


class Server:
    """One server, which may be a primary or a standby."""

    def __init__(self, lanes="auto", tls=None):
        self.service = ReplicatedService(CONFIG, check_every=CHECK_EVERY)
        settings = LaneSettings(choice=lanes)
        caller, identity = (tls.caller, tls.server) if tls else (None, None)

        def connect(address):
            return StandbyLink(address, TOKEN, QUICK, settings, caller)

        self.server = ShardServer(
            self.service,
            HOST,
            TOKEN,
            NUM_WORKERS,
            settings,
            identity,
            lambda server: add_replication(server, self.service, connect),
        )
        self.server.start()
        self.address = self.server.address
        self.calls = ReplicationClient(self.address, TOKEN, QUICK, identity=caller)

    def stop(self):
        self.calls.close()
        self.server.stop()


@pytest.fixture
def servers():
    """Makes servers, and stops them in the end."""
    made = []

    def make(*arguments):
        made.append(Server(*arguments))
        return made[-1]

    yield make
    for server in made:
        server.stop()


def load(client):
    parameters = torch.zeros(LAYOUT.num_parameters)
    state = initial_state(CONFIG.rule, parameters, torch.zeros(LAYOUT.num_statistics))
    client.load(ModelState(Clocks(), state.vectors, {}))


def client_of(address, lane="grpc", tls=None):
    identity = tls.caller if tls else None
    return ParameterClient(
        (address,), LAYOUT, TOKEN, PATIENT, LaneSettings(choice=lane), identity=identity
    )


def push_ones(client, worker, sequence):
    gradient = torch.full((LAYOUT.num_parameters,), 0.001 * (worker + 1))
    delta = torch.ones(LAYOUT.num_statistics)
    (receipt,) = client.push(worker, 0, sequence, [0], 2, gradient, delta)
    return receipt


def pair_of(servers, client, lanes="auto", tls=None):
    primary, standby = servers(lanes, tls), servers(lanes, tls)
    client.follow(0, primary.address, 1)
    load(client)
    primary.calls.attach(standby.address, 2)
    return primary, standby


def checksum(server):
    service = server.service
    return (service._shard or service._standby._shard).checksum()


class Workers:
    """Each pushes from a thread, with a client of its own, until the block ends."""

    def __init__(self, address, lane, tls=None):
        self.clients = [client_of(address, lane, tls) for _ in range(NUM_WORKERS)]
        self.receipts = [[] for _ in range(NUM_WORKERS)]
        self._enough = threading.Event()

    def __enter__(self):
        self._work = [background(lambda w=w: self._push(w)) for w in range(NUM_WORKERS)]
        return self

    def _push(self, worker):
        receipts = self.receipts[worker]
        while not self._enough.is_set():
            receipts.append(push_ones(self.clients[worker], worker, len(receipts)))

    def each_pushes(self, more=5):
        """Waits until each of them has so many receipts more."""
        before = [len(each) for each in self.receipts]
        eventually(
            lambda: all(
                len(now) >= then + more for now, then in zip(self.receipts, before, strict=True)
            )
        )

    def follow(self, server, epoch):
        for client in self.clients:
            client.follow(0, server.address, epoch)

    def __exit__(self, *_):
        self._enough.set()
        for each in self._work:
            each.result(DEADLINE_S)
        for client in self.clients:
            client.close()


@pytest.mark.parametrize("lane", ["shm", "tcp", "grpc"])
def test_no_push_is_lost_or_doubled_when_primaries_are_lost_in_turn(servers, lane):
    client = client_of("nowhere:1")
    primary, standby = pair_of(servers, client)
    with Workers(primary.address, lane) as workers:
        for epoch in (3, 5):
            workers.each_pushes()
            primary.server.stop()
            standby.calls.promote(epoch)
            workers.follow(standby, epoch)
            primary, standby = standby, servers()
            workers.each_pushes(1)
            primary.calls.attach(standby.address, epoch + 1)
            workers.each_pushes()
    num_receipts = sum(map(len, workers.receipts))
    client.follow(0, primary.address, 9)
    (status,) = client.describe()
    assert status.clocks.updates == num_receipts
    assert status.pushes == {Outcome.APPLIED.value: num_receipts}
    versions = sorted(receipt.version for each in workers.receipts for receipt in each)
    assert versions == list(range(num_receipts))
    assert status.replica.state == "in_step"
    assert checksum(primary) == checksum(standby)
    client.close()


def test_all_of_it_goes_on_under_tls(servers):
    tls = new_identities()
    client = client_of("nowhere:1", tls=tls)
    primary, standby = pair_of(servers, client, "auto", tls)
    push_ones(client, 0, 0)
    client.expect(
        {0, 1},
    )
    client.fence(2, 4)
    client.enter(1, 1)
    primary.server.stop()
    assert standby.calls.promote(3) == 1
    client.follow(0, standby.address, 3)
    assert push_ones(client, 0, 0).version == 0
    assert client.fence(2, 4) == {}
    assert push_ones(client, 0, 1).version == 1
    client.close()


def test_a_call_under_way_is_made_again_at_the_new_server(servers):
    client = client_of("nowhere:1")
    primary, standby = pair_of(servers, client)
    pulling = background(
        lambda: client.pull(
            torch.zeros(LAYOUT.num_parameters), torch.zeros(LAYOUT.num_statistics), [1]
        )
    )
    eventually(lambda: primary.service._published._waiters)
    standby.calls.promote(3)
    client.follow(0, standby.address, 3)
    client.follow(0, primary.address, 3)  # it comes late
    assert client.shards[0].address == standby.address
    push_ones(client, 0, 0)
    assert pulling.result(DEADLINE_S) == [1]
    client.close()


def test_a_primary_in_whose_place_another_is_answers_nobody(servers):
    client = client_of("nowhere:1")
    primary, standby = pair_of(servers, client)
    standby.calls.promote(3)
    pushing = background(lambda: push_ones(client, 0, 0))
    eventually(lambda: primary.service._is_retired)
    with pytest.raises(grpc.RpcError) as refused:
        standby.calls.attach(primary.address, 3)
    assert code_of(refused.value) is not None
    assert not pushing.done()
    client.follow(0, standby.address, 3)
    assert pushing.result(DEADLINE_S).version == 0
    assert standby.service.status().clocks.updates == 1
    client.close()


def test_a_standby_that_goes_is_not_waited_for_once_it_is_given_up(servers):
    client = client_of("nowhere:1")
    primary, standby = pair_of(servers, client)
    standby.server.stop()
    pushing = background(lambda: push_ones(client, 0, 0))
    eventually(lambda: primary.service.status().replica.num_behind)
    assert not pushing.done()
    primary.calls.detach(3)
    assert pushing.result(DEADLINE_S).version == 0
    another = servers()
    primary.calls.attach(another.address, 4)
    assert checksum(another) == checksum(primary)
    client.close()


def codes(call):
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return None


@contextmanager
def raw_calls(server):
    """Bare calls to replication, with any token."""
    with grpc.insecure_channel(server.address) as channel:

        def call(method, request, token=TOKEN):
            rpc = channel.unary_unary(f"/asynception.Replication/{method}", None, None)
            return codes(
                lambda: rpc(request, timeout=DEADLINE_S, metadata=(("asynception-token", token),))
            )

        yield call


def test_strangers_and_nonsense_change_nothing(servers):
    client = client_of("nowhere:1")
    primary, standby = pair_of(servers, client)
    push_ones(client, 0, 0)
    before = checksum(standby), checksum(primary)
    with raw_calls(standby) as call:
        request = pb.EpochRequest(epoch=9).SerializeToString()
        for method in ("Attach", "Detach", "Promote", "Retire", "Follow"):
            assert call(method, request, "wrong") is grpc.StatusCode.UNAUTHENTICATED
            assert call(method, b"\xff\xff") is grpc.StatusCode.INVALID_ARGUMENT
        fence = pb.FenceRequest(worker=0, incarnation=1)
        for order, code in (
            (pb.Order(epoch=1, index=1), grpc.StatusCode.ABORTED),
            (pb.Order(epoch=2, index=5), grpc.StatusCode.INVALID_ARGUMENT),
            (pb.Order(epoch=3, index=1), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            message = pb.Operation(order=order, fence=fence)
            assert call("Follow", message.SerializeToString()) is code
        empty = pb.Operation(order=pb.Order(epoch=2, index=1))
        assert call("Follow", empty.SerializeToString()) is grpc.StatusCode.INVALID_ARGUMENT
    link = StandbyLink(standby.address, TOKEN, QUICK, LaneSettings())
    with pytest.raises(Exception, match="epoch 1 is over"):
        link.seed(Order(1, 0), primary.service._shard.image())
    link.close()
    assert (checksum(standby), checksum(primary)) == before
    assert push_ones(client, 0, 1).version == 1
    client.close()


def test_a_server_without_replicas_knows_nothing_of_them():
    server = ShardServer(ShardService(CONFIG), HOST, TOKEN, NUM_WORKERS)
    server.start()
    calls = ReplicationClient(server.address, TOKEN, QUICK)
    try:
        assert codes(lambda: calls.promote(1)) is grpc.StatusCode.UNIMPLEMENTED
        client = client_of(server.address)
        load(client)
        (status,) = client.describe()
        assert status.replica is None
        client.close()
    finally:
        calls.close()
        server.stop()


def _serve(line):
    server = Server()
    line.send(server.address)
    line.recv()


def test_a_killed_primary_loses_no_push_that_was_answered(servers):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,))
    process.start()
    try:
        address = here.recv()
        client, standby = client_of(address), servers()
        load(client)
        calls = ReplicationClient(address, TOKEN, QUICK)
        calls.attach(standby.address, 2)
        with Workers(address, "auto") as workers:
            workers.each_pushes()
            os.kill(process.pid, signal.SIGKILL)
            standby.calls.promote(3)
            workers.follow(standby, 3)
            workers.each_pushes()
        num_receipts = sum(map(len, workers.receipts))
        assert standby.service.status().clocks.updates == num_receipts
        calls.close()
        client.close()
    finally:
        process.kill()
        process.join()
