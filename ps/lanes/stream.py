"""Flat vectors as a stream of messages of about a megabyte, and back."""

import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

CHUNK_NUM_BYTES = 1 << 20
"""Bytes in a message; with 64 KB a stream runs at half the speed."""

assert sys.byteorder == "little", "vectors travel as little-endian float32"


class StreamError(ValueError):
    """The bytes of a stream don't fill the expected vectors exactly."""


def bytes_of(vector: Tensor) -> npt.NDArray[np.uint8]:
    """A contiguous CPU vector's memory."""
    assert vector.is_contiguous()
    return vector.numpy().view(np.uint8)


def chunks(vectors: Sequence[Tensor]) -> Iterator[bytes]:
    """The bytes of contiguous CPU vectors, one after the other. Each message is a fresh copy,
    since gRPC takes nothing but `bytes`."""
    for vector in vectors:
        source = bytes_of(vector)
        for start in range(0, source.size, CHUNK_NUM_BYTES):
            yield source[start : start + CHUNK_NUM_BYTES].tobytes()


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
