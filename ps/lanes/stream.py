"""Flat vectors as a stream of messages of about a megabyte, and back.

A float32 vector may travel as bf16, rounded to nearest, ties to even: blocks of it are cast, one
after the other, in a buffer that stays in cache.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CHUNK_NUM_BYTES = 1 << 20
"""Bytes in a message; with 64 KB a stream runs at half the speed."""

BLOCK_NUMEL = CHUNK_NUM_BYTES // 2
"""Elements that are cast at a time: as bf16, one message."""

assert sys.byteorder == "little", "vectors travel as little-endian float32 or bf16"


class StreamError(ValueError):
    """The bytes of a stream don't fill the expected vectors exactly."""


def bytes_of(vector: Tensor) -> npt.NDArray[np.uint8]:
    """A contiguous CPU vector's memory."""
    assert vector.is_contiguous()
    return vector.view(torch.uint8).numpy()


def new_block() -> Tensor:
    """A buffer for casts, in bf16."""
    return torch.zeros(BLOCK_NUMEL, dtype=torch.bfloat16)


def beside_blocks(vector: Tensor, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A vector's parts, each beside as many elements of a buffer of `new_block`."""
    for part in torch.split(vector, BLOCK_NUMEL):
        yield part, buffer[: part.numel()]


def copy_rounded(into: Tensor, vector: Tensor, buffer: Tensor) -> None:
    """Copy float32 elements as they would arrive if they travelled as bf16."""
    for (part, block), out in zip(
        beside_blocks(vector, buffer), torch.split(into, BLOCK_NUMEL), strict=True
    ):
        out.copy_(block.copy_(part))


def chunks(vectors: Sequence[Tensor]) -> Iterator[bytes]:
    """The bytes of contiguous CPU vectors, one after the other. Each message is a fresh copy,
    since gRPC takes nothing but `bytes`."""
    for vector in vectors:
        source = bytes_of(vector)
        for start in range(0, source.size, CHUNK_NUM_BYTES):
            yield source[start : start + CHUNK_NUM_BYTES].tobytes()


def narrowed_chunks(vector: Tensor) -> Iterator[bytes]:
    """A float32 vector as bf16, in messages like those of `chunks`."""
    for part, block in beside_blocks(vector, new_block()):
        yield bytes_of(block.copy_(part)).tobytes()


def fill(vectors: Sequence[Tensor], messages: Iterable[bytes]) -> None:
    """Write a stream's bytes into contiguous CPU vectors, in order.

    Raises StreamError if there are too few or too many; the vectors' contents are then arbitrary.
    """
    sinks = [bytes_of(vector) for vector in vectors]
    expected, received = sum(sink.size for sink in sinks), 0
    for message in messages:
        if received + len(message) > expected:
            raise StreamError(f"more than the expected {expected} bytes")
        _scatter(sinks, received, np.frombuffer(message, np.uint8))
        received += len(message)
    if received != expected:
        raise StreamError(f"{received} bytes instead of {expected}")


def _scatter(
    sinks: Sequence[npt.NDArray[np.uint8]], position: int, source: npt.NDArray[np.uint8]
) -> None:
    for sink in sinks:
        if position < sink.size and source.size:
            count = min(sink.size - position, source.size)
            np.copyto(sink[position : position + count], source[:count])
            source, position = source[count:], position + count
        position -= sink.size
