"""Malformed traffic for `wire_fuzz.py`: bytes that no shard may act on, made from a seed.

Valid messages are changed a little, or replaced by noise. What comes out may be a valid push by
chance; `is_acted_on` knows, from the protocol's text alone, and such a stream is cut short.
"""

import random
import struct
from collections.abc import Callable

from google.protobuf.message import DecodeError, Message

from protos import parameter_server_pb2 as pb

FRAME_NUM_BYTES, LENGTH_NUM_BYTES = 2048, 4
MAX_TIMEOUT_S = 86_400.0
NUM_PARAMETERS, NUM_STATISTICS = 352, 64
ITEM_NUM_BYTES: dict[int, int] = {pb.FLOAT32: 4, pb.BFLOAT16: 2}

ODD_NUMBERS = (0, 1, -1, 2, 31, 32, 352, 353, 2**15, 2**31 - 1, -(2**31))
LONG_NUMBERS = (*ODD_NUMBERS, 2**31, 2**53, 2**63 - 1, -(2**63))
ODD_SECONDS = (-1.0, float("nan"), float("inf"), float("-inf"), 1e300, -0.001, 31.0, 86_401.0)
LETHAL_LENGTHS = (0, 1, 2044, 2045, 2**16, 2**31, 2**32 - 1)


def body_num_bytes(dtype: int) -> int:
    """Of a push's vectors."""
    return ITEM_NUM_BYTES[dtype] * NUM_PARAMETERS + 4 * NUM_STATISTICS


def frame(message: bytes, length: int | None = None) -> bytes:
    """A message as it travels in the tcp and shm lanes; `length`: what the frame claims."""
    prefix = struct.pack("<I", len(message) if length is None else length)
    return (prefix + message)[:FRAME_NUM_BYTES].ljust(FRAME_NUM_BYTES, b"\0")


def _call_of(head: bytes) -> pb.LaneCall | None:
    """The call in a frame; None for one that ends the connection."""
    (length,) = struct.unpack_from("<I", head)
    if length > FRAME_NUM_BYTES - LENGTH_NUM_BYTES:
        return None
    try:
        call = pb.LaneCall.FromString(head[LENGTH_NUM_BYTES : LENGTH_NUM_BYTES + length])
    except DecodeError:
        return None
    return call if 0 < call.timeout_s <= MAX_TIMEOUT_S else None


def is_acted_on(stream: bytes) -> bool:
    """Whether these bytes, in the tcp lane, hold a push to be settled, or a pull that waits."""
    while len(stream) >= FRAME_NUM_BYTES:
        call, stream = _call_of(stream[:FRAME_NUM_BYTES]), stream[FRAME_NUM_BYTES:]
        kind = call.WhichOneof("call") if call else None
        if call is None or kind not in ("pull", "push"):
            return False
        if kind == "pull" and 0 < call.pull.wait_s <= call.timeout_s:
            return True
        if kind == "pull":
            continue
        push = call.push
        lengths = (push.num_parameters, push.num_statistics)
        if lengths != (NUM_PARAMETERS, NUM_STATISTICS) or push.dtype not in ITEM_NUM_BYTES:
            return False
        num_bytes = body_num_bytes(push.dtype)
        if push.sequence >= 0 and push.num_samples > 0 and len(stream) >= num_bytes:
            return True
        stream = stream[num_bytes:]
    return False


class Cases:
    """Endless malformed traffic, the same for a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def noise(self, most: int) -> bytes:
        """Random bytes, up to so many."""
        return self.random.randbytes(self.random.randint(0, most))

    def pull(self) -> pb.PullRequest:
        """A good request, of which nothing has to be waited for."""
        return pb.PullRequest(dtype=self.random.choice((pb.FLOAT32, pb.BFLOAT16)))

    def push(self) -> pb.PushHeader:
        """A good header, of a worker that nobody knows."""
        return pb.PushHeader(
            worker=self.random.randint(5, 1000),
            sequence=self.random.randint(0, 5),
            num_samples=1,
            num_parameters=NUM_PARAMETERS,
            num_statistics=NUM_STATISTICS,
            dtype=self.random.choice((pb.FLOAT32, pb.BFLOAT16)),
        )

    def odd_push(self) -> pb.PushHeader:
        """A header with one field, or a few, that may not be meant."""
        header, choice = self.push(), self.random.choice
        for _ in range(self.random.randint(1, 3)):
            name = choice([field.name for field in header.DESCRIPTOR.fields])
            if name == "order":  # a shard that is no standby takes none
                header.order.epoch = header.order.index = choice(LONG_NUMBERS)
                continue
            wide = name not in ("worker", "incarnation", "num_samples", "dtype")
            setattr(header, name, choice(LONG_NUMBERS if wide else ODD_NUMBERS))
        return header

    def mutated(self, data: bytes) -> bytes:
        """These bytes with a few changes."""
        for _ in range(self.random.randint(1, 4)):
            data = self.random.choice(_MUTATIONS)(self.random, data)
        return data

    def refused_call(self, *, pushes: bool) -> bytes:
        """One that is answered by one refusal, or by "not yet", and the connection goes on.

        pushes: also pushes that can't be meant, whose vectors follow bare, as in the tcp lane.
        """
        kind = self.random.randrange(4 if pushes else 3)
        if kind == 0:
            pull = pb.PullRequest(wait_s=self.random.choice(ODD_SECONDS))
        elif kind == 1:
            pull = pb.PullRequest()
            setattr(pull, "dtype", self.random.choice([2, 7, 2**31 - 1]))  # noqa: B010 (no DType)
        elif kind == 2:
            pull = pb.PullRequest(at_least=self.random.choice([2**53, 2**63 - 1]))
        else:
            return self._push_not_meant()
        return frame(pb.LaneCall(timeout_s=30.0, pull=pull).SerializeToString())

    def _push_not_meant(self) -> bytes:
        header = self.push()
        if self.random.random() < 0.5:
            header.sequence = self.random.choice((-1, -(2**63)))
        else:
            header.num_samples = self.random.choice((0, -1, -(2**31)))
        head = frame(pb.LaneCall(timeout_s=30.0, push=header).SerializeToString())
        return head + self.random.randbytes(body_num_bytes(header.dtype))

    def lane_stream(self) -> bytes:
        """What ends a connection, by itself or with the sender's end; nothing in it is settled."""
        stream = self._lane_stream()
        while is_acted_on(stream):
            stream = stream[:-1]
        return stream

    def _lane_stream(self) -> bytes:
        choice = self.random.randrange(6)
        if choice == 0:
            return self.noise(3 * FRAME_NUM_BYTES)
        call = pb.LaneCall(timeout_s=self.random.choice((30.0, 1.0, *ODD_SECONDS)))
        if choice == 1:
            call.pull.CopyFrom(self.pull())
            return self.mutated(frame(call.SerializeToString()))
        if choice == 2:
            call.released = bool(self.random.randrange(2))
            return frame(call.SerializeToString()) + self.noise(64)
        if choice == 3:
            call.push.CopyFrom(self.odd_push())
            return frame(call.SerializeToString()) + self.noise(2 * FRAME_NUM_BYTES)
        if choice == 4:
            length = self.random.choice((*LETHAL_LENGTHS, self.random.getrandbits(32)))
            return frame(self.noise(FRAME_NUM_BYTES), length)
        call.push.CopyFrom(self.push())
        head = frame(call.SerializeToString())
        return self.mutated(head + self.random.randbytes(body_num_bytes(call.push.dtype)))

    def memory(self) -> pb.Memory:
        """Places in segments that are too small, or aren't there."""
        choice = self.random.choice
        places = [
            pb.Place(segment=choice(ODD_NUMBERS), offset_num_bytes=choice(LONG_NUMBERS))
            for _ in range(self.random.randint(0, 3))
        ]
        return pb.Memory(places=places, new_segments=[choice(ODD_NUMBERS) for _ in places[:2]])

    def memory_call(self) -> bytes:
        """A frame of the shm lane whose memory can't hold what it promises."""
        call = pb.LaneCall(timeout_s=30.0, memory=self.memory())
        call.push.CopyFrom(self.push() if self.random.random() < 0.7 else self.odd_push())
        return frame(call.SerializeToString())

    def control(self, kind: type[Message]) -> bytes:
        """What can't be decoded as a control message of this kind."""
        endless = b"\xff" * 11  # a tag that doesn't end
        message = self.mutated(kind().SerializeToString() + self.noise(40)) + endless
        try:
            kind.FromString(message)
        except DecodeError:
            return message
        return endless  # which a field of bytes had swallowed

    def push_stream(self) -> list[bytes]:
        """The messages of a gRPC push: a header without sense, or vectors of other lengths."""
        header = self.push() if self.random.random() < 0.5 else self.odd_push()
        whole = body_num_bytes(header.dtype) if header.dtype in ITEM_NUM_BYTES else 0
        num_bytes = self.random.choice((0, 1, whole - 1, whole + 1, 2 * whole, 5 * whole))
        if num_bytes == whole:
            num_bytes += 1
        head = header.SerializeToString()
        if self.random.random() < 0.2:
            head = self.control(pb.PushHeader)
        body = self.random.randbytes(max(0, num_bytes))
        cut = self.random.randint(0, len(body))
        return [head, body[:cut], body[cut:]]

    def state_stream(self) -> list[bytes]:
        """The messages of a gRPC Load: vectors of other names or lengths, or too few bytes."""
        numels = {"parameters": NUM_PARAMETERS, "statistics": NUM_STATISTICS}
        numels[self.random.choice(("parameters", "other", "statistics"))] = self.random.choice(
            LONG_NUMBERS
        )
        vectors = [pb.Vector(name=name, numel=numel) for name, numel in numels.items()]
        return [pb.StateHeader(vectors=vectors).SerializeToString(), self.noise(4096)]


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data or b"\0")
    changed[rng.randrange(min(len(changed), 80))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    at = rng.randint(0, min(len(data), 80))
    put = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x80" * 10, rng.randbytes(4)))
    return data[:at] + put + data[at + len(put) :]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randint(0, len(data))]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + data[max(0, at - rng.randint(1, 2048)) :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randint(0, min(len(data), 80))
    return data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at:]


_MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip,
    _flip,
    _overwrite,
    _cut,
    _repeat,
    _insert,
)
