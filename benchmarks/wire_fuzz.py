"""Malformed traffic against a live server: does it crash, change, grow, or stop to serve?

    python benchmarks/wire_fuzz.py --cases 1000000

One server process; frames, connections and calls of `wire_cases.py` over tcp, shared memory and
gRPC, with and without tickets and the run's token; with --tls all of it inside mutual TLS, and
strangers' handshakes besides. After each round a good worker pushes once, and
the shard must hold exactly the good pushes. Exits with 1, and names the seed, if a promise broke.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from wire_cases import FRAME_NUM_BYTES, Cases
from wire_handshakes import Handshakes, ended, send_to_the_end
from wire_target import PATIENCE_S, TOKEN, PromiseBroken, Target, check

from protos import parameter_server_pb2 as pb
from ps.lanes.lane import LaneName
from ps.server import TOKEN_KEY

PIPELINED = 64
"""Calls that are sent before their answers are read."""
ROUND = {
    "refused calls, tcp": 40 * PIPELINED,
    "refused calls, shm": 10 * PIPELINED,
    "lethal bytes, tcp": 250,
    "lethal bytes, shm": 150,
    "impossible memory, shm": 150,
    "wrong tickets": 150,
    "bytes at the gRPC port": 100,
    "gRPC without the token": 250,
    "gRPC garbage": 250,
    "gRPC streams": 150,
}
"""Cases of one round by kind."""
IN_TLS = {"strangers' handshakes, tcp": 250, "strangers' handshakes, gRPC": 100}
"""And with TLS."""
SLOW_SENDERS = 4
"""Connections that stop in the middle, for as long as the server lets them."""
MAX_RSS_RATIO = 1.3
"""Of the server's memory at the end to that after a tenth of the cases."""

METHODS = {
    "Describe": pb.DescribeRequest,
    "Fence": pb.FenceRequest,
    "Cut": pb.CutRequest,
    "Expect": pb.ExpectRequest,
    "Enter": pb.EnterRequest,
    "Release": pb.ReleaseRequest,
    "OpenLane": pb.OpenLaneRequest,
}


class Attack:
    """All kinds of cases against one target."""

    def __init__(self, target: Target, seed: int) -> None:
        self._target, self._cases = target, Cases(seed)
        self.counts = Counter[str]()
        self._slow: list[tuple[float, socket.socket]] = []
        self._kinds: dict[str, Callable[[int], None]] = {
            "refused calls, tcp": lambda count: self._refused(count, "tcp"),
            "refused calls, shm": lambda count: self._refused(count, "shm"),
            "lethal bytes, tcp": lambda count: self._lethal(count, "tcp"),
            "lethal bytes, shm": lambda count: self._lethal(count, "shm"),
            "impossible memory, shm": self._impossible_memory,
            "wrong tickets": self._wrong_tickets,
            "bytes at the gRPC port": self._http_noise,
            "gRPC without the token": self._strangers,
            "gRPC garbage": self._garbage,
            "gRPC streams": self._streams,
        }
        self.sizes = ROUND | IN_TLS if target.caller else ROUND
        self._handshakes = Handshakes(target.caller, self._cases) if target.caller else None
        self._kinds |= {
            "strangers' handshakes, tcp": lambda count: self._shake(count, self._reach_tcp),
            "strangers' handshakes, gRPC": lambda count: self._shake(count, self._reach_grpc),
        }

    def round(self, share: float = 1.0) -> None:
        """Each kind in turn, with a share of its cases."""
        self._slow_senders()
        for kind, count in self.sizes.items():
            count = max(1, round(share * count))
            self._kinds[kind](count)
            self.counts[kind] += count

    def end(self) -> None:
        """Wait until the server has had enough of the slow senders."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self._slow:
            self._drop_ended()
            check(time.monotonic() < deadline_s, "a slow sender is waited for, for ever")
            time.sleep(0.1)

    @contextmanager
    def _admitted(self, lane: LaneName) -> Iterator[socket.socket]:
        with self._target.connect(lane) as connection:
            connection.sendall(self._target.offer.ticket)
            check(len(_receive(connection, FRAME_NUM_BYTES)) == FRAME_NUM_BYTES, "no welcome")
            yield connection

    def _refused(self, count: int, lane: LaneName) -> None:
        with self._admitted(lane) as connection:
            for start in range(0, count, PIPELINED):
                number = min(PIPELINED, count - start)
                calls = [self._cases.refused_call(pushes=lane == "tcp") for _ in range(number)]
                connection.sendall(b"".join(calls))
                for _ in range(number):
                    data = _receive(connection, FRAME_NUM_BYTES)
                    check(len(data) == FRAME_NUM_BYTES, "a refusal ended the connection")
                    length = int.from_bytes(data[:4], "little")
                    answer = pb.LaneAnswer.FromString(data[4 : 4 + length])
                    refused = answer.HasField("refusal") or answer.pull.not_yet
                    check(refused, f"an answer to what can't be meant: {answer}")

    def _lethal(self, count: int, lane: LaneName) -> None:
        for _ in range(count):
            with self._admitted(lane) as connection:
                send_to_the_end(connection, self._cases.lane_stream())

    def _impossible_memory(self, count: int) -> None:
        rng = self._cases.random
        fd = os.memfd_create("too small")
        os.ftruncate(fd, rng.choice((0, 1, 512)))
        for _ in range(count):
            with self._admitted("shm") as connection, contextlib.suppress(ConnectionError):
                fds = [fd] * rng.choice((0, 1, 1, 2, 3, 12))
                socket.send_fds(connection, [self._cases.memory_call()], fds)
                send_to_the_end(connection, b"")
        os.close(fd)

    def _wrong_tickets(self, count: int) -> None:
        for number in range(count):
            with self._target.connect("tcp" if number % 2 else "shm") as connection:
                send_to_the_end(connection, self._cases.noise(100))

    def _http_noise(self, count: int) -> None:
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        for _ in range(count):
            with self._reach_grpc() as connection:
                begins = self._cases.random.random() < 0.7
                send_to_the_end(connection, (preface if begins else b"") + self._cases.noise(300))

    def _reach_grpc(self) -> socket.socket:
        host, _, port = self._target.address.rpartition(":")
        return socket.create_connection((host, int(port)), PATIENCE_S)

    def _reach_tcp(self) -> socket.socket:
        return self._target.reach("tcp")

    def _shake(self, count: int, reach: Callable[[], socket.socket]) -> None:
        assert self._handshakes is not None
        for _ in range(count):
            with reach() as connection:
                self._handshakes.attempt(connection, self._target.offer.ticket)

    def _strangers(self, count: int) -> None:
        """Also with messages that would be good from others."""
        rng = self._cases.random
        calls = []
        for _ in range(count):
            method, kind = rng.choice(list(METHODS.items()))
            token = rng.choice((None, "", "Fuzz", "fuzz ", "fuzzy", "f" * 5000))
            metadata = ((TOKEN_KEY, token),) if token is not None else ()
            request = kind().SerializeToString() if rng.random() < 0.5 else self._cases.noise(5000)
            calls.append(self._begin(method, request, metadata))
        for code in _codes(calls):
            check(code is grpc.StatusCode.UNAUTHENTICATED, f"a stranger was answered {code}")

    def _begin(self, method: str, request: bytes, metadata: tuple[tuple[str, str], ...]) -> Any:
        call = self._target.call(method)
        return call.future(request, metadata=metadata, timeout=PATIENCE_S)

    def _garbage(self, count: int) -> None:
        """From someone with the token: what can't be decoded, or is out of bounds, or too long."""
        rng, metadata, calls = self._cases.random, ((TOKEN_KEY, TOKEN),), []
        for number in range(count):
            method, kind = rng.choice(list(METHODS.items()))
            request = self._cases.control(kind)
            if number % 5 == 0:
                method, vectors = "Cut", rng.choice(([], ["nothing"], ["parameters"]))
                wait_s = -1.0 if vectors == ["parameters"] else rng.choice((float("nan"), -1.0))
                request = pb.CutRequest(
                    name="x", wait_s=wait_s, vectors=vectors
                ).SerializeToString()
            elif number % 50 == 1:
                request = bytes(5 << 20)
            calls.append(self._begin(method, request, metadata))
        refusals = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
        for code in _codes(calls):
            check(code in refusals, f"garbage was answered {code}")

    def _streams(self, count: int) -> None:
        metadata, channel = ((TOKEN_KEY, TOKEN),), self._target.channel
        makers = {"Push": self._cases.push_stream, "Load": self._cases.state_stream}
        calls = []
        for number in range(count):
            name = "Load" if number % 4 == 0 else "Push"
            call = channel.stream_unary(f"/asynception.Bytes/{name}", None, None)
            calls.append(call.future(iter(makers[name]()), metadata=metadata, timeout=PATIENCE_S))
        for code in _codes(calls):
            check(code is grpc.StatusCode.INVALID_ARGUMENT, f"a bad stream was answered {code}")

    def _slow_senders(self) -> None:
        """Connections that stop: in the handshake, before or in the ticket, or in a frame."""
        self._drop_ended()
        rng = self._cases.random
        while len(self._slow) < SLOW_SENDERS:
            connection, sent = self._begun(rng.choice(("tcp", "shm")), rng)
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
            self._slow.append((time.monotonic(), connection))
            self.counts["slow senders"] += 1

    def _begun(self, lane: LaneName, rng: random.Random) -> tuple[socket.socket, bytes]:
        """A connection, and what to stop after."""
        if self._handshakes and lane == "tcp" and rng.random() < 0.5:
            hello = self._handshakes.hello()
            return self._target.reach(lane), hello[: rng.randrange(len(hello))]
        connection, ticket = self._target.connect(lane), self._target.offer.ticket
        sent = (ticket + self._cases.refused_call(pushes=False))[: rng.randint(0, 2000)]
        # A whole ticket alone would be a good, idle connection.
        return connection, sent[:31] if len(sent) == len(ticket) else sent

    def _drop_ended(self) -> None:
        left = []
        for began_s, connection in self._slow:
            connection.settimeout(0)
            try:
                ended(connection)
                connection.close()
            except (BlockingIOError, ssl.SSLWantReadError):
                check(time.monotonic() - began_s < PATIENCE_S, "a slow sender is waited for")
                left.append((began_s, connection))
        self._slow = left


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    """So many bytes, or those until its end."""
    data = b""
    while len(data) < num_bytes and (part := connection.recv(num_bytes - len(data))):
        data += part
    return data


def _codes(calls: Sequence[Any]) -> Iterator[grpc.StatusCode]:
    for call in calls:
        yield call.code()


def fuzz(num_cases: int, seed: int, *, tls: bool = False) -> dict[str, object]:
    """Run about so many cases; what was done. Raises PromiseBroken."""
    began_s = time.monotonic()
    target = Target(tls=tls)
    try:
        attack = Attack(target, seed)
        share = min(1.0, num_cases / sum(attack.sizes.values()))
        base_num_bytes = 0
        while (done := sum(attack.counts.values())) < num_cases:
            attack.round(share)
            target.push_and_check()
            if not base_num_bytes and done >= num_cases / 10:
                base_num_bytes = target.rss_num_bytes
        attack.end()
        target.push_and_check()
        last_num_bytes = target.rss_num_bytes
        ratio = last_num_bytes / (base_num_bytes or last_num_bytes)
        check(ratio < MAX_RSS_RATIO, f"the server's memory grew by {ratio:.2f}")
        errors = target.end()
        check(not errors, f"the server logged {len(errors)} errors, first: {errors[:1]}")
    finally:
        target.kill()
    return {
        "cases": sum(attack.counts.values()),
        "seed": seed,
        "by kind": dict(attack.counts),
        "good pushes, each applied once": target.num_pushes,
        "server MB": round(last_num_bytes / 1e6, 1),
        "ratio of memory": round(ratio, 3),
        "seconds": round(time.monotonic() - began_s, 1),
    }


def main() -> int:
    """Returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tls", action="store_true")
    given = parser.parse_args()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # of each stranger the server says a line
    try:
        print(json.dumps(fuzz(given.cases, given.seed, tls=given.tls), indent=1))
    except PromiseBroken as broken:
        print(f"seed {given.seed}: {broken}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
