"""A live shard server in a process of its own, and a good worker that checks what it holds."""

import logging
import multiprocessing as mp
import os
import socket
from multiprocessing.connection import Connection
from typing import Any

import grpc
import torch
from wire_cases import NUM_PARAMETERS, NUM_STATISTICS

from model.flat import Segment
from protos import parameter_server_pb2 as pb
from ps.authority import new_identities
from ps.client import ModelState, ParameterClient
from ps.consistency import Async
from ps.lanes.lane import LaneName, LaneSettings
from ps.layout import Layout, plan_layout
from ps.retry import RetryPolicy
from ps.rules import SGD, Ema, warm_up
from ps.schedule import Constant, Horizon
from ps.server import TOKEN_KEY, ShardServer
from ps.service import ShardService
from ps.state import ShardConfig, initial_state
from ps.tls import Identity

HOST, TOKEN = "127.0.0.1", "fuzz"
PATIENCE_S = 120.0
RETRY = RetryPolicy(attempt_s=PATIENCE_S, deadline_s=PATIENCE_S, backoff_s=0.01)


class PromiseBroken(AssertionError):
    """The server did what no malformed case may bring about."""


def check(kept: bool, what: str) -> None:
    """Raises PromiseBroken."""
    if not kept:
        raise PromiseBroken(what)


def layout() -> Layout:
    """One small shard: its bytes are soon sent, and all code is the same."""
    parameters = (Segment("kernel", (NUM_PARAMETERS,), 0, True),)
    return plan_layout(parameters, (Segment("mean", (NUM_STATISTICS,), 0, False),), 1)


class _Errors(logging.Handler):
    """Counts what our own code logs as a bug."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


def serve(line: Connection, identity: Identity | None) -> None:
    """The server's process: sends its address, and at the end the errors that it logged."""
    torch.set_num_threads(1)
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    of_grpc = logging.getLogger("grpc")  # it logs each call that can't be decoded
    of_grpc.propagate = False
    of_grpc.addHandler(logging.NullHandler())
    warm_up(SGD(), [torch.float32])
    horizon = Horizon(epoch_samples=100, num_workers=4)
    ranges = layout().shards[0]
    config = ShardConfig(ranges, SGD(), Constant(lr=1.0), horizon, Ema(decay=0.9), Async())
    service = ShardService(config)
    server = ShardServer(service, HOST, TOKEN, num_workers=4, identity=identity)
    server.start()
    line.send(server.address)
    line.recv()
    line.send(errors.found)
    server.stop()


class Target:
    """The live server, and the good worker beside all that is thrown at it."""

    def __init__(self, *, tls: bool = False) -> None:
        identities = new_identities() if tls else None
        self.caller = identities.caller if identities else None
        """What one shows to be let in; None without TLS."""
        self._context = self.caller.caller_context() if self.caller else None
        context = mp.get_context("spawn")
        self._line, theirs = context.Pipe()
        shown = identities.server if identities else None
        self.process = context.Process(target=serve, args=(theirs, shown), daemon=True)
        self.process.start()
        theirs.close()
        self.address: str = self._line.recv()
        options = (("grpc.enable_http_proxy", 0),)
        self.channel = (
            self.caller.channel(self.address, options)
            if self.caller
            else grpc.insecure_channel(self.address, options)
        )
        self._layout = layout()
        self._clients = [self._client(lane) for lane in ("shm", "tcp", "grpc")]
        start = initial_state(SGD(), torch.zeros(NUM_PARAMETERS), torch.zeros(NUM_STATISTICS))
        self._clients[2].load(ModelState(start.clocks, start.vectors, {}))
        self.num_pushes = 0

    def _client(self, lane: LaneName) -> ParameterClient:
        lanes = LaneSettings(choice=lane)
        return ParameterClient(
            [self.address], self._layout, TOKEN, RETRY, lanes, identity=self.caller
        )

    def call(self, method: str) -> Any:
        """A unary call with raw bytes."""
        return self.channel.unary_unary(f"/asynception.ParameterServer/{method}", None, None)

    @property
    def offer(self) -> pb.OpenLaneReply:
        """A ticket, and where to show it."""
        metadata = ((TOKEN_KEY, TOKEN),)
        reply: bytes = self.call("OpenLane")(b"", metadata=metadata, timeout=PATIENCE_S)
        return pb.OpenLaneReply.FromString(reply)

    def reach(self, lane: LaneName) -> socket.socket:
        """A bare connection to a lane: before its ticket, and before its handshake."""
        offer = self.offer
        if lane == "tcp":
            return socket.create_connection((HOST, offer.tcp_port), PATIENCE_S)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE_S)
        connection.connect(f"\0{offer.shm_socket}")
        return connection

    def connect(self, lane: LaneName) -> socket.socket:
        """A connection to a lane before its ticket; with TLS on tcp, after a good handshake."""
        connection = self.reach(lane)
        if lane == "shm" or self._context is None or self.caller is None:
            return connection
        return self._context.wrap_socket(connection, server_hostname=self.caller.name)

    def push_and_check(self) -> None:
        """A good push; then the shard must hold all good ones, each once, and nothing else."""
        client = self._clients[self.num_pushes % len(self._clients)]
        ones = torch.ones(NUM_PARAMETERS), torch.ones(NUM_STATISTICS)
        client.push(0, 0, self.num_pushes, [self.num_pushes], 1, *ones)
        self.num_pushes += 1
        parameters, statistics = torch.zeros(NUM_PARAMETERS), torch.zeros(NUM_STATISTICS)
        for each in self._clients:
            (version,) = each.pull(parameters, statistics)
            check(version == self.num_pushes, f"version {version} after {self.num_pushes} pushes")
            check(bool((parameters == -float(version)).all()), "other parameters than were made")
            check(bool((statistics == float(version)).all()), "other statistics than were made")
        (status,) = client.describe()
        applied = {name: count for name, count in status.pushes.items() if count}
        check(applied == {"applied": self.num_pushes}, f"receipts {applied}")
        lives = {worker: dict(each) for worker, each in status.last_sequences.items()}
        check(lives == {0: {0: self.num_pushes - 1}}, f"workers {lives}")

    @property
    def rss_num_bytes(self) -> int:
        """The server's resident memory."""
        with open(f"/proc/{self.process.pid}/statm") as table:
            return int(table.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> list[str]:
        """Stop the server; what it logged as errors of its own."""
        for client in self._clients:
            client.close()
        self.channel.close()
        self._line.send(None)
        errors: list[str] = self._line.recv()
        self.process.join(PATIENCE_S)
        check(self.process.exitcode == 0, f"the server ended with {self.process.exitcode}")
        return errors

    def kill(self) -> None:
        """Whatever has become of it."""
        self.process.kill()
