"""How fast bytes travel between two processes, over plain TCP as in the tcp lane."""

import hmac
import secrets
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator, Mapping

from asynception.doctor.finding import Verdict, fail, ok, warn
from ps.lanes.gate import listen

MEASURED_S = 1.0
PINGS = 50

ALLOWANCE_S = 5.0
"""For connecting, and for what is on its way when a measurement ends."""

SLOW, VERY_SLOW = 0.3e9, 0.02e9
"""Bytes a second: between a gigabit Ethernet and the next faster one; of a fast one of 100 Mbit."""

LONG_S, VERY_LONG_S = 0.002, 0.1
"""A round trip: longer than within a data centre; than across an ocean."""

APART = 3.0
"""How many times as fast one way, or other nodes' links, are for it to be out of the ordinary."""

_TOKEN_NUM_BYTES = 16
_BULK, _PING = b"b", b"p"
_BLOCK = 1 << 20
_REPORT = struct.Struct("!Qd")


class Peer:
    """One end of a link. It listens at its node's address, for callers that know its token alone.

    Raises OSError wherever the network fails.
    """

    def __init__(self, host: str, port_range: tuple[int, int] | None) -> None:
        """host: this node's address. port_range: `lanes.port_range`, for firewalls' sake."""
        self._host, self._port_range = host, port_range
        self._token = secrets.token_bytes(_TOKEN_NUM_BYTES)

    def now(self) -> float:
        """This node's clock, in seconds since the epoch."""
        return time.time()

    def open(self) -> tuple[str, int, bytes]:
        """Listen for two connections, for a while: (address, port, token) of a new listener."""
        listener = listen(self._host, self._port_range)
        listener.settimeout(3 * ALLOWANCE_S)
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return self._host, listener.getsockname()[1], self._token

    def measure(self, host: str, port: int, token: bytes) -> tuple[float, float]:
        """(bytes a second, seconds of a round trip) to another peer's listener."""
        return self._bytes_per_s(host, port, token), self._round_trip_s(host, port, token)

    def _serve(self, listener: socket.socket) -> None:
        with listener:
            for _ in range(2):
                try:
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(ALLOWANCE_S)
                        self._answer(connection)
                except OSError:  # the caller has the same error, and tells
                    return

    def _answer(self, connection: socket.socket) -> None:
        hello = connection.recv(_TOKEN_NUM_BYTES + 1, socket.MSG_WAITALL)
        if not hmac.compare_digest(hello[:_TOKEN_NUM_BYTES], self._token):
            return
        if hello[_TOKEN_NUM_BYTES:] == _PING:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while byte := connection.recv(1):
                connection.sendall(byte)
            return
        block, num_bytes, started_s = bytearray(_BLOCK), 0, time.perf_counter()
        while received := connection.recv_into(block):
            num_bytes += received
        connection.sendall(_REPORT.pack(num_bytes, time.perf_counter() - started_s))

    @staticmethod
    def _bytes_per_s(host: str, port: int, token: bytes) -> float:
        """As the receiver counts them."""
        block = bytes(_BLOCK)
        with socket.create_connection((host, port), ALLOWANCE_S) as connection:
            connection.sendall(token + _BULK)
            end_s = time.perf_counter() + MEASURED_S
            while time.perf_counter() < end_s:
                connection.sendall(block)
            connection.shutdown(socket.SHUT_WR)
            report = connection.recv(_REPORT.size, socket.MSG_WAITALL)
        if len(report) < _REPORT.size:
            raise OSError("the other end closed the connection")
        num_bytes, took_s = _REPORT.unpack(report)
        return float(num_bytes / max(took_s, 1e-9))

    @staticmethod
    def _round_trip_s(host: str, port: int, token: bytes) -> float:
        times = []
        with socket.create_connection((host, port), ALLOWANCE_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token + _PING)
            for _ in range(PINGS):
                started_s = time.perf_counter()
                connection.sendall(b".")
                if not connection.recv(1):
                    raise OSError("the other end closed the connection")
                times.append(time.perf_counter() - started_s)
        return statistics.median(times)


def plan_rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of nodes in rounds, so that every node is measured with its two neighbours in a ring.

    In a round each node has one partner at most. A node that is alone is measured with itself.
    """
    if num_nodes <= 2:
        return [[(0, num_nodes - 1)]]
    ring = [(node, (node + 1) % num_nodes) for node in range(num_nodes)]
    even = num_nodes - num_nodes % 2
    rounds = [ring[0:even:2], ring[1:even:2], ring[even:]]
    return [pairs for pairs in rounds if pairs]


def judge_link(
    there: float, back: float, round_trip_s: float, step_num_bytes: int, loopback: bool
) -> Verdict:
    """there, back: bytes a second. step_num_bytes: of a pull and a push; 0
    if unknown."""
    slower = min(there, back)
    kind = "loopback, " if loopback else ""
    found = (
        f"{kind}{there / 1e9:.2f} GB/s there, {back / 1e9:.2f} back, round trip"
        f" {1e3 * round_trip_s:.2f} ms"
    )
    if step_num_bytes:
        took_ms = 1e3 * step_num_bytes / max(slower, 1.0)
        found += f"; a step's pull and push take {took_ms:,.1f} ms"
    mend = (
        "end what else uses these cores, and see the check of congestion control"
        if loopback
        else "use faster links, place servers and workers closer, or push and pull more seldom"
        " (training.accumulate_grad_batches)"
    )
    if slower < VERY_SLOW or round_trip_s > VERY_LONG_S:
        return fail(found, mend)
    if slower < SLOW or round_trip_s > LONG_S or max(there, back) > APART * slower:
        return warn(found, mend)
    return ok(found)


def judge_nodes(speeds: Mapping[tuple[int, int], float]) -> dict[int, Verdict]:
    """Of nodes whose links are all slow, while those between the others aren't.

    speeds: bytes a second, the slower way's, by the numbers of the two nodes; 0 if it failed.
    """
    return {
        node: warn(
            f"at most {own / 1e9:.2f} GB/s on either link, where the others have "
            f"{others / 1e9:.2f} between them: probably its own link",
            "see that node's network card, its speed (ethtool), its port at the switch, and what "
            "limits its traffic (tc, the kind of machine)",
        )
        for node in sorted({node for pair in speeds for node in pair})
        for own, others in _own_and_others(node, speeds)
        if own < SLOW and others > APART * own
    }


def _own_and_others(
    node: int, speeds: Mapping[tuple[int, int], float]
) -> Iterator[tuple[float, float]]:
    own = [speed for pair, speed in speeds.items() if node in pair]
    others = [speed for pair, speed in speeds.items() if node not in pair]
    if len(own) > 1 and others:
        yield max(own), statistics.median(others)
