"""What decodes bytes that come over the wire, for `fuzz.py`."""

import io
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from fuzz_target import Target
from google.protobuf.message import Message
from wire_cases import NUM_PARAMETERS, NUM_STATISTICS
from wire_target import layout

from protos import parameter_server_pb2 as pb
from ps.answering import REFUSED
from ps.authority import RUN_NAME, new_identities
from ps.consistency import Sync
from ps.gathering import SUM, held_name
from ps.image import MARKED_PARAMETERS, MARKED_STATISTICS
from ps.imaging import image_from, image_header, operation_from, order_from, room_for
from ps.lanes.calling import answer_of
from ps.lanes.frames import FRAME_NUM_BYTES, Wire, frame_of
from ps.lanes.headers import check_dtype
from ps.lanes.lane import LaneError, Refused
from ps.lanes.tcp import TcpServing
from ps.lanes.tls_wire import TlsWire
from ps.messages import receipt_from, sequences_from, state_from, status_from
from ps.push import Order, Push
from ps.rules import SGD, Ema
from ps.schedule import Constant, Horizon
from ps.service import ShardService
from ps.shard import Shard
from ps.standby import Standby
from ps.state import ShardConfig, initial_state
from ps.tls import Identities

MAX_IMAGE_NUM_BYTES = 1 << 28
"""Of a standby's vectors, of a shard of 1.7 KB."""

# Frames of the tcp lane, at both ends.


class _Replayed:
    """A socket at which bytes arrive, and then as many zeros as the largest push has bytes."""

    family = socket.AF_UNIX

    def __init__(self, data: bytes) -> None:
        self._left = memoryview(data + bytes(4 * (NUM_PARAMETERS + NUM_STATISTICS)))

    def recv(self, num_bytes: int, flags: int) -> bytes:
        assert flags == socket.MSG_PEEK
        return bytes(self._left[:num_bytes])

    def recv_into(self, room: memoryview, num_bytes: int, _: int) -> int:
        part, self._left = self._left[:num_bytes], self._left[num_bytes:]
        room[: len(part)] = part
        return len(part)

    def send(self, data: memoryview) -> int:
        return data.nbytes

    def settimeout(self, timeout_s: float | None) -> None:
        pass

    def setsockopt(self, *_: object) -> None:
        pass


class _Impatient(ShardService):
    """Nobody waits for a version that will not come."""

    def reached(self, version: int, wait_s: float, worker: int | None = None) -> bool:
        return super().reached(version, 0.0, worker)


@cache
def _config() -> ShardConfig:
    """In step: its images have most in them."""
    horizon = Horizon(epoch_samples=100, num_workers=4)
    policy = Sync()
    return ShardConfig(layout().shards[0], SGD(), Constant(lr=1.0), horizon, Ema(decay=0.9), policy)


def _start() -> Any:
    return initial_state(SGD(), torch.zeros(NUM_PARAMETERS), torch.zeros(NUM_STATISTICS))


def _wire(data: bytes) -> Wire:
    """Each frame in `data` is two bytes with its length, and then all of it but closing zeros."""
    stream = io.BytesIO(data)
    frames = b""
    while head := stream.read(2):
        part = stream.read(int.from_bytes(head, "little") % (FRAME_NUM_BYTES + 1))
        frames += part.ljust(FRAME_NUM_BYTES, b"\0")
    wire = Wire(_Replayed(frames))  # type: ignore[arg-type]
    wire.within(60)
    return wire


def _packed(*messages: Message) -> bytes:
    """What `_wire` makes frames of."""
    bodies = [frame_of(message).rstrip(b"\0") for message in messages]
    return b"".join(len(body).to_bytes(2, "little") + body for body in bodies)


def _serve_frames(data: bytes) -> None:
    service = _Impatient(_config(), allocate=torch.zeros)
    service.load(_start())
    TcpServing(service, _wire(data)).serve()


def _calls() -> Sequence[bytes]:
    push = pb.PushHeader(
        worker=1,
        num_samples=8,
        num_parameters=NUM_PARAMETERS,
        num_statistics=NUM_STATISTICS,
    )
    pull = pb.LaneCall(timeout_s=5, pull=pb.PullRequest(worker=1))
    ordered = pb.PushHeader(order=pb.Order(epoch=1))
    ordered.MergeFrom(push)
    calls = (pull, pb.LaneCall(timeout_s=5, push=push), pb.LaneCall(timeout_s=5, push=ordered))
    return [_packed(call) for call in calls] + [_packed(pull, pull)]


def _take_answers(data: bytes) -> None:
    wire = _wire(data)
    answer_of(wire, "welcome")
    check_dtype(answer_of(wire, "pull").pull, torch.float32)
    receipt_from(answer_of(wire, "receipt").receipt)


def _answers() -> Sequence[bytes]:
    welcome = pb.LaneAnswer(welcome=pb.Welcome(num_parameters=7))
    pull = pb.LaneAnswer(pull=pb.PullHeader(version=5))
    receipt = pb.LaneAnswer(receipt=pb.Receipt(outcome=pb.STALE, lr=0.1, staleness=3))
    refusal = pb.LaneAnswer(refusal=pb.Refusal(status="UNAVAILABLE", reason="no"))
    return [_packed(welcome, pull, receipt), _packed(welcome, refusal)]


# What a stranger says to the tcp lane inside TLS, who has no certificate.

TLS_HANDSHAKE = b"\x16"
"""How a record begins that goes on with a handshake; others end it."""


@cache
def _identities() -> Identities:
    return new_identities()


@cache
def _server_context() -> ssl.SSLContext:
    return _identities().server.server_context()


def _shake_hands(data: bytes) -> None:
    """They are taken if the server goes on with the handshake; it can't come to its end."""
    near, far = socket.socketpair()
    with far:
        far.sendall(data)
        far.shutdown(socket.SHUT_WR)
        wire = TlsWire(near, _server_context())
        wire.within(60)
        try:
            wire.handshake()
        except LaneError:
            with suppress(BlockingIOError):
                if far.recv(1, socket.MSG_DONTWAIT) == TLS_HANDSHAKE:
                    return
            raise
        finally:
            wire.close()


def _hellos() -> Sequence[bytes]:
    outgoing = ssl.MemoryBIO()
    context = _identities().caller.caller_context()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=RUN_NAME)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    return [hello, hello[: len(hello) // 2], hello + hello]


# gRPC messages, and what a standby begins from.


def _convert(data: bytes) -> None:
    """The first byte says which message it is."""
    kind, body = data[:1], data[1:]
    if kind == b"s":
        status_from(pb.Status.FromString(body))
    elif kind == b"c":
        sequences_from([pb.WorkerClock.FromString(body)])
    elif kind == b"h":
        state_from(pb.StateHeader.FromString(body), {})
    elif kind == b"r":
        receipt_from(pb.Receipt.FromString(body))
    else:
        operation_from(pb.Operation.FromString(body))


def _messages() -> Sequence[bytes]:
    replica = pb.ReplicaStatus(epoch=3, state="seeding")
    clock = pb.WorkerClock(worker=1, last_sequences={0: 5})
    kinds: dict[bytes, Message] = {
        b"s": pb.Status(workers=[clock], pushes={"applied": 1}, replica=replica),
        b"c": clock,
        b"h": pb.StateHeader(vectors=[pb.Vector(name="ema", numel=3)], workers=[clock]),
        b"r": pb.Receipt(outcome=pb.APPLIED),
        b"o": pb.Operation(enter=pb.EnterRequest(worker=1, clock=3)),
    }
    return [kind + message.SerializeToString() for kind, message in kinds.items()]


def _seed_standby(data: bytes) -> None:
    """With a first byte of its own, it announces the vectors that the rest of it needs."""
    fits = data[:1] == b"!"
    header = pb.ImageHeader.FromString(data[1:] if fits else data)
    if fits:
        _announce(header)
    vectors = room_for(header, _config().vector_numels())
    num_bytes = sum(vector.nbytes for vector in vectors.values())
    assert num_bytes <= MAX_IMAGE_NUM_BYTES, f"room for {num_bytes} bytes"
    for vector in vectors.values():
        vector.zero_()
    Standby(_config(), torch.zeros).seed(order_from(header.order), image_from(header, vectors))


def _announce(header: pb.ImageHeader) -> None:
    held = [held_name(push.worker) for push in header.gathered]
    numels = dict(_config().vector_numels())
    for name in (SUM, *held):
        numels[f"{name}.gradient"] = numels["parameters"]
        numels[f"{name}.statistics_delta"] = numels["statistics"]
    numels[MARKED_PARAMETERS], numels[MARKED_STATISTICS] = NUM_PARAMETERS, NUM_STATISTICS
    dtypes = {vector.name: vector.dtype for vector in header.vectors}
    del header.vectors[:]
    for name, numel in numels.items():
        header.vectors.add(name=name, numel=numel, dtype=dtypes.get(name, pb.FLOAT32))


def _images() -> Sequence[bytes]:
    """Of a shard that has one of the two gradients of its next version."""
    shard = Shard(_config(), _start(), torch.zeros)
    shard.expect([0, 1])
    push = Push(0, 0, 0, 0, 8, torch.ones(NUM_PARAMETERS), torch.ones(NUM_STATISTICS))
    shard.push(push)
    header = image_header(Order(1, 0), shard.image()).SerializeToString()
    return [header, b"!" + header]


WIRE_TARGETS = {
    "calls": Target(_serve_frames, (LaneError,), _calls),
    "answers": Target(_take_answers, (LaneError, Refused, *REFUSED), _answers),
    "handshakes": Target(_shake_hands, (LaneError,), _hellos),
    "messages": Target(_convert, REFUSED, _messages),
    "images": Target(_seed_standby, REFUSED, _images),
}
"""By name."""
