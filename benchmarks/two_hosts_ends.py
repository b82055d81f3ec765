"""What runs at the two ends of `two_hosts.py`, each in a namespace of its own.

two_hosts_ends.py serve ADDRESS           tells where it serves, then serves until it is ended
two_hosts_ends.py work SERVERS ORDER      prints the rounds that it measured
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial

import torch
from measured_rows import Cell, Measured, measure
from plain_sockets import SocketExchange, accept
from shard_processes import (
    TOKEN,
    cpu_s_of,
    load_zeros,
    peak_mb_of,
    serve,
    shard_config,
    vectors_num_bytes,
    xception_layout,
)
from transport_cells import figures
from worker_processes import Exchange, LaneExchange, Vectors, loop

from ps.client import ParameterClient, RetryPolicy
from ps.lanes.lane import LaneName, LaneSettings
from ps.lanes.stream import bytes_of
from ps.malloc import tune_malloc
from ps.wire import WireSettings

RULE = "momentum"
PLAIN = Cell("plain sockets", "float32")
LANES: tuple[LaneName, ...] = ("tcp", "grpc")
WIRES = {
    "float32": WireSettings(),
    "bfloat16": WireSettings(pull="bfloat16", push="bfloat16"),
}
LOOPS = (PLAIN, *(Cell(lane, wire) for lane in LANES for wire in WIRES))
"""What is measured: a lane or plain sockets, and the type that travels."""


@dataclass(frozen=True)
class Servers:
    """Where the servers' end is reached."""

    address: str
    shard: str
    """host:port of the shard's gRPC."""
    plain_port: int
    pid: int


@dataclass(frozen=True)
class Order:
    """What a worker is to measure."""

    rounds: int
    seconds: float
    loops: str
    """Only those whose name contains this."""


def serve_end(address: str) -> None:
    """A shard with all lanes, and plain sockets, in one process."""
    layout = xception_layout(1)
    server = serve(shard_config(layout, 0, RULE), address, 1, LaneSettings())
    listener = socket.create_server((address, 0))
    num_bytes = 4 * layout.num_parameters
    threading.Thread(target=accept, args=(listener, num_bytes), daemon=True).start()
    port = listener.getsockname()[1]
    print(json.dumps(vars(Servers(address, server.address, port, os.getpid()))), flush=True)
    signal.sigwait({signal.SIGTERM})
    server.stop()
    os._exit(0)  # the threads of plain sockets have no end


class _Worker:
    """One worker's exchanges with one shard."""

    def __init__(self, servers: Servers, seconds: float) -> None:
        self._servers, self._seconds = servers, seconds
        self._layout = xception_layout(1)
        self._vectors = Vectors.of_worker(self._layout)
        self._control = ParameterClient((servers.shard,), self._layout, TOKEN, RetryPolicy())
        load_zeros(self._control, RULE)

    def exchange(self, number: int, cell: Cell) -> Exchange:
        """number: among the exchanges, since a shard tells pushes apart by their workers."""
        vectors = self._vectors
        if cell == PLAIN:
            address = (self._servers.address, self._servers.plain_port)
            pulled, pushed = (bytes_of(v) for v in (vectors.parameters, vectors.gradient))
            return SocketExchange([address], [pulled], [pushed])
        client = ParameterClient(
            (self._servers.shard,),
            self._layout,
            TOKEN,
            RetryPolicy(),
            LaneSettings.model_validate({"choice": cell.what}),
            WIRES[cell.work],
        )
        client.connect()
        return LaneExchange(client, number, vectors, drops=False)

    def run(self, cell: Cell, exchange: Exchange) -> Measured:
        """Loop once, and say how it went."""
        pid, layout = self._servers.pid, self._layout
        cpu_s, apply_s = cpu_s_of(pid), self._apply_s()
        looped = loop(exchange, time.monotonic(), self._seconds)
        cpu_s, shard_s = cpu_s_of(pid) - cpu_s, self._apply_s() - apply_s
        num_bytes = 4 * layout.num_parameters if cell == PLAIN else vectors_num_bytes(layout)
        return figures([looped], num_bytes, shard_s / looped.num_updates, cpu_s, peak_mb_of(pid))

    def _apply_s(self) -> float:
        (status,) = self._control.describe()
        return status.apply_s


def work_end(servers: Servers, order: Order) -> None:
    """Measure all loops in every round, after one that touches all memory."""
    torch.set_num_threads(1)
    tune_malloc()
    worker = _Worker(servers, order.seconds)
    chosen = [cell for cell in LOOPS if order.loops in f"{cell.what} {cell.work}"]
    opened = {cell: worker.exchange(number, cell) for number, cell in enumerate(chosen)}
    jobs = {cell: partial(worker.run, cell, exchange) for cell, exchange in opened.items()}
    for job in jobs.values():
        job()
    rounds = measure(jobs, order.rounds)
    print(json.dumps([[((c.what, c.work), m) for c, m in r.items()] for r in rounds]))


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if sys.argv[1] == "serve":
        serve_end(sys.argv[2])
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        work_end(Servers(**json.loads(sys.argv[2])), Order(**json.loads(sys.argv[3])))
