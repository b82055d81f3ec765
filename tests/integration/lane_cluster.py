"""Shards in this process, clients in any lane, and a relay between them that can fail."""

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from waiting import DEADLINE_S, eventually

from model.flat import ALIGNMENT, Segment
from protos import parameter_server_pb2 as pb
from ps.client import ModelState, ParameterClient, RetryPolicy
from ps.consistency import Async
from ps.lanes.frames import Wire, frame_of
from ps.lanes.lane import LaneError, LaneSettings
from ps.lanes.memory_wire import MemoryWire
from ps.lanes.segment import shared_zeros
from ps.lanes.tls_wire import TlsWire
from ps.layout import plan_layout
from ps.rules import SGD, Ema
from ps.schedule import Constant, Horizon
from ps.server import ShardServer
from ps.service import ShardService, Staging
from ps.shard import ShardConfig, initial_state
from ps.snapshot import Snapshot
from ps.wire import AS_IS, WireSettings

HOST, TOKEN = "127.0.0.1", "the run's token"
PATIENT = RetryPolicy(attempt_s=DEADLINE_S, deadline_s=DEADLINE_S, backoff_s=0.01)
HASTY = RetryPolicy(attempt_s=DEADLINE_S, deadline_s=0.1, backoff_s=0.01)
BFLOAT16 = WireSettings(pull="bfloat16", push="bfloat16")
NUM_PARAMETERS, NUM_STATISTICS = 352, 64
STATISTICS = (Segment("mean", (20,), 0, False), Segment("variance", (20,), 32, False))


def layout_of(num_shards=1, num_parameters=NUM_PARAMETERS, statistics=STATISTICS):
    kernel = num_parameters - 3 * ALIGNMENT
    bias = Segment("bias", (41,), 0, False)
    return plan_layout(
        (bias, Segment("kernel", (kernel,), 3 * ALIGNMENT, True)), statistics, num_shards
    )


def config_of(ranges, rule=SGD(), policy=Async()):  # noqa: B008 (frozen)
    horizon = Horizon(epoch_samples=100, num_workers=3)
    return ShardConfig(ranges, rule, Constant(lr=1.0), horizon, Ema(decay=0.9), policy)


class WatchedService(ShardService):
    """Counts what calls under way have in use, "staging" and "pins", and what any ever had."""

    def __init__(self, config: ShardConfig, **settings) -> None:
        super().__init__(config, **settings)
        self.in_use, self.ever_used = Counter[str](), Counter[str]()
        self._counting = threading.Lock()

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        with self._counting:
            self.in_use[what] += 1
            self.ever_used[what] += 1
        try:
            yield
        finally:
            with self._counting:
                self.in_use[what] -= 1

    @contextmanager
    def staging(self, dtype: torch.dtype = torch.float32) -> Iterator[Staging]:
        with self._counted("staging"), super().staging(dtype) as staging:
            yield staging

    @contextmanager
    def pinned(self, worker: int | None = None) -> Iterator[Snapshot]:
        with self._counted("pins"), super().pinned(worker) as snapshot:
            yield snapshot


class Cluster:
    """Shard servers, and the clients of them that were asked for."""

    def __init__(
        self,
        layout,
        *,
        server_lanes=None,
        num_workers=8,
        service_settings=(),
        wire=AS_IS,
        tls=None,
        **settings,
    ):
        self.layout, self.wire = layout, wire
        self.caller = tls.caller if tls else None
        configs = [config_of(ranges, **settings) for ranges in layout.shards]
        self.services = [WatchedService(c, **dict(service_settings)) for c in configs]
        self.servers = [
            ShardServer(
                service, HOST, TOKEN, num_workers, server_lanes, tls.server if tls else None
            )
            for service in self.services
        ]
        self.clients = []
        for server in self.servers:
            server.start()

    @property
    def addresses(self):
        return [server.address for server in self.servers]

    @property
    def gate(self):
        return self.servers[0]._gate

    def client(self, lane="grpc", retry=PATIENT, addresses=None, token=TOKEN, wire=None):
        settings = (retry, LaneSettings(choice=lane), wire or self.wire)
        client = ParameterClient(
            addresses or self.addresses, self.layout, token, *settings, identity=self.caller
        )
        self.clients.append(client)
        return client

    def load(self):
        rule = self.services[0].config.rule
        vectors = (torch.zeros(self.layout.num_parameters), torch.zeros(self.layout.num_statistics))
        state = initial_state(rule, *vectors)
        self.client().load(ModelState(state.clocks, state.vectors, {}))

    def close(self):
        for client in self.clients:
            client.close()
        for server in self.servers:
            server.stop()


def push_ones(client, worker, sequence, incarnation=0, value=1.0, pulled=0, make=torch.zeros):
    """Takes 1 from every parameter, with SGD and lr 1, and adds 1 to every statistic."""
    return client.push(
        worker,
        incarnation,
        sequence,
        [pulled] * len(client.shards),
        2,
        make(client.layout.num_parameters).fill_(value),
        make(client.layout.num_statistics).fill_(1.0),
    )


def push_shared_ones(client, worker, sequence, **settings):
    """The same from shared memory, which the shm lane doesn't copy."""
    return push_ones(client, worker, sequence, make=shared_zeros, **settings)


def pull(client, at_least=None, worker=None):
    parameters = torch.full((client.layout.num_parameters,), 99.0)
    statistics = torch.full((client.layout.num_statistics,), 99.0)
    return client.pull(parameters, statistics, at_least, worker), parameters, statistics


def assert_whole(layout, versions, parameters, statistics, wire=AS_IS):
    for ranges, version in zip(layout.shards, versions, strict=True):
        arrived = torch.tensor(-float(version)).to(wire.pull_dtype).float()
        assert (parameters[ranges.parameters.slice()] == arrived).all()
        assert (statistics[ranges.statistics.slice()] == version).all()


def assert_at(client, versions):
    """What is pulled says that exactly `versions` pushes of ones were applied."""
    pulled, parameters, statistics = pull(client)
    assert pulled == versions
    assert_whole(client.layout, versions, parameters, statistics)


def held(service):
    """All that a shard holds, copied."""
    with service._lock:
        shard = service._loaded()
        return shard.capture(), dict(shard.settled)


def assert_holds_the_same(before, service):
    (state, settled), (later, later_settled) = before, held(service)
    assert (state.clocks, state.last_sequences) == (later.clocks, later.last_sequences)
    for name, vector in state.vectors.items():
        assert torch.equal(vector, later.vectors[name]), name
    assert settled == later_settled


class Relay:
    """Passes on connections to a shard, bytes and file descriptors, and may cut them.

    `cuts`: for each connection to come, (bytes up, bytes down) after which it is cut, None for
    never; with no entry left, `default` counts. `passed` is how much the last connection carried.
    `is_idle`: no connection is open, so that the next client makes a new one.
    """

    def __init__(self, listener: socket.socket, target: Callable[[], socket.socket]) -> None:
        self._listener, self._target = listener, target
        self.cuts: list[tuple[int | None, int | None]] = []
        self.default: tuple[int | None, int | None] = (None, None)
        self.passed = [0, 0]
        self.num_connections = 0
        self._pumps: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            limits = self.cuts.pop(0) if self.cuts else self.default
            far, passed = self._target(), [0, 0]
            self.passed = passed
            for way, (source, sink) in enumerate([(near, far), (far, near)]):
                arguments = (source, sink, limits[way], passed, way)
                pump = threading.Thread(target=_pump, args=arguments, daemon=True)
                pump.start()
                self._pumps.append(pump)

    def is_idle(self):
        return not any(pump.is_alive() for pump in self._pumps)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _pump(source, sink, limit, passed, way):
    try:
        while limit is None or passed[way] < limit:
            room = 1 << 16 if limit is None else min(1 << 16, limit - passed[way])
            data, fds = _receive(source, room)
            if not data:
                break
            _send(sink, data, fds)
            passed[way] += len(data)
    except OSError:
        pass
    finally:
        for each in (source, sink):
            _shut_down(each)


def _shut_down(connection):
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _receive(source, room):
    if source.family != socket.AF_UNIX:
        return source.recv(room), []
    data, fds, _, _ = socket.recv_fds(source, room, 8)
    return data, fds


def _send(sink, data, fds):
    if fds:
        sent = socket.send_fds(sink, [data], fds)
        data = data[sent:]
        for fd in fds:
            socket.close(fd)
    sink.sendall(data)


def relay_to(cluster, lane) -> tuple[Relay, list[str]]:
    """A relay in front of shard 0's lane, and the addresses with which a client takes it."""
    gate, address = cluster.gate, cluster.addresses[0]
    if lane == "shm":
        name = gate._offer.shm_socket
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0{name}-relay")
        listener.listen()
        gate._offer.shm_socket += "-relay"

        def target():
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.connect(f"\0{name}")
            return connection

        return Relay(listener, target), [address]
    listener = socket.create_server((HOST, 0))
    near_port = listener.getsockname()[1]
    port = gate._offer.tcp_port if lane == "tcp" else int(address.rpartition(":")[2])
    relay = Relay(listener, lambda: socket.create_connection((HOST, port)))
    if lane == "tcp":
        gate._offer.tcp_port = near_port
        return relay, [address]
    return relay, [f"{HOST}:{near_port}"]


def connect(gate, lane) -> socket.socket:
    if lane == "tcp":
        return socket.create_connection((HOST, gate._offer.tcp_port), DEADLINE_S)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(f"\0{gate._offer.shm_socket}")
    return connection


def wire_to(gate, lane, caller=None) -> Wire:
    """caller: what to show a server with TLS."""
    connection = connect(gate, lane)
    if lane == "shm":
        wire = MemoryWire(connection)
    elif caller is None:
        wire = Wire(connection)
    else:
        wire = TlsWire(connection, caller.caller_context(), caller.name)
    wire.within(DEADLINE_S)
    wire.handshake()
    return wire


@contextmanager
def admitted(gate, lane, timeout_s=DEADLINE_S, caller=None):
    """A connection that the server has let in."""
    wire = wire_to(gate, lane, caller)
    wire.send_bytes(gate.offer().ticket)
    assert wire.receive(pb.LaneAnswer).welcome.num_parameters > 0
    wire.within(timeout_s)
    try:
        yield wire
    finally:
        wire.close()


def frame(**call):
    return frame_of(pb.LaneCall(**{"timeout_s": 30.0, **call}))


def push_frame(num_parameters=NUM_PARAMETERS, num_statistics=NUM_STATISTICS, dtype=0, **settings):
    header = pb.PushHeader(
        worker=1,
        num_samples=1,
        num_parameters=num_parameters,
        num_statistics=num_statistics,
        dtype=dtype,
    )
    return frame(push=header, **settings)


def assert_ended(wire):
    """The server has ended the connection, without another word."""
    with pytest.raises(LaneError, match=r"ended|reset|Broken pipe"):
        wire.receive(pb.LaneAnswer)


def assert_unharmed(cluster, before):
    """Nothing happened to the shard, nothing is in use, and others are served."""
    (service,) = cluster.services
    eventually(lambda: cluster.gate.num_connections == 0)
    assert not any(service.in_use.values())
    assert_holds_the_same(before, service)
    for lane in ("shm", "tcp"):
        client = cluster.client(lane)
        assert_at(client, [service.status().clocks.updates])
        assert client.lanes == [lane]
        client.close()
    eventually(lambda: cluster.gate.num_connections == 0)


PULL = frame(pull=pb.PullRequest())
