"""Vectors in memory that another process of this host can map.

Each segment is an anonymous memory file (memfd): it has no name anywhere, reaches another process
only over a socket, and is gone with the last process that has it, however that ends. So a crash
leaves nothing behind, and the size of /dev/shm limits nothing.

A segment is sealed: it never changes its size, so no mapping of it can break off, and nobody but
its maker can map it to write.
"""

import fcntl
import logging
import mmap
import os
import warnings
import weakref

import torch
from torch import Tensor

from ps.lanes.lane import LaneError

_NAME = "asynception"
_F_SEAL_FUTURE_WRITE = 0x10  # not in Python's fcntl yet; Linux 5.1

_log = logging.getLogger(__name__)


class Segment(mmap.mmap):
    """The maker's mapping, alive as long as a tensor in it."""

    fd: int
    """For handing on; closed with the segment."""


_segments: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()
"""By the address at which the tensors in them begin."""


def shared_zeros(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A vector of zeros, touched, in a segment of its own.

    In private memory where the system has no memfd or gives none; lanes then copy more.
    """
    if numel and hasattr(os, "memfd_create"):
        try:
            return _vector_in(_make(numel * dtype.itemsize), dtype)
        except OSError as error:
            _log.warning("no shared memory for %d elements: %s", numel, error)
    return torch.zeros(numel, dtype=dtype)


def segment_of(vector: Tensor) -> Segment | None:
    """The segment that a vector, or the vector it is a view of, was made in."""
    return _segments.get(vector.untyped_storage().data_ptr())


def offset_in_segment(vector: Tensor) -> int:
    """Bytes from its segment's start to a vector's first element."""
    return int(vector.storage_offset()) * vector.element_size()


def map_vector(
    fd: int, offset_num_bytes: int, numel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A read-only vector in a segment that another process made.

    Raises LaneError if it isn't a sealed segment that holds so much.
    """
    if offset_num_bytes < 0 or offset_num_bytes % dtype.itemsize or numel <= 0:
        raise LaneError(f"no {numel} elements at byte {offset_num_bytes} of a segment")
    try:
        size = os.fstat(fd).st_size
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        num_bytes = numel * dtype.itemsize
        if not seals & fcntl.F_SEAL_SHRINK or size < offset_num_bytes + num_bytes:
            raise LaneError(f"a segment of {size} bytes with seals {seals:#x}")
        return _mapped(fd, offset_num_bytes, numel, dtype)
    except OSError as error:
        raise LaneError(f"no segment: {error}") from error


def _make(num_bytes: int) -> Segment:
    fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, num_bytes)  # an error now rather than SIGBUS later
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        segment = Segment(fd, num_bytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    segment.fd = fd
    weakref.finalize(segment, os.close, fd).atexit = False
    return segment


def _vector_in(segment: Segment, dtype: torch.dtype) -> Tensor:
    vector = torch.frombuffer(segment, dtype=dtype)
    _segments[vector.data_ptr()] = segment
    return vector


def _mapped(fd: int, offset_num_bytes: int, numel: int, dtype: torch.dtype) -> Tensor:
    lead = offset_num_bytes % mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    length = lead + numel * dtype.itemsize
    memory = mmap.mmap(fd, length, flags, mmap.PROT_READ, offset=offset_num_bytes - lead)
    with warnings.catch_warnings():  # that it can't be written to is the point
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(memory, dtype=dtype, count=numel, offset=lead)
