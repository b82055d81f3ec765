"""Whether vectors can be shared between processes of this host: what the shm lane needs."""

import os
import secrets
import socket

import torch

from asynception.doctor.finding import Verdict, fail, ok, warn
from ps.lanes.lane import LaneError
from ps.lanes.segment import map_vector, segment_of, shared_zeros

_NUMEL = 4 << 20


def measure_shared_memory(choice: str) -> Verdict:
    """choice: `lanes.choice` of the recipe."""
    return judge_shared_memory(_what_is_missing(), choice)


def _what_is_missing() -> str | None:
    """Makes a segment, hands it over a Unix socket, and maps it, as the lane does."""
    if not hasattr(os, "memfd_create"):
        return "this system has no memfd_create"
    made = shared_zeros(_NUMEL)
    segment = segment_of(made)
    if segment is None:
        return "the system gives no memory file of 16 MB"
    made += torch.arange(_NUMEL)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(f"\0asynception-doctor-{secrets.token_hex(8)}")
            fd = _handed_over(segment.fd)
        try:
            mapped = map_vector(fd, 0, _NUMEL)
        finally:
            os.close(fd)
    except (OSError, LaneError) as error:
        return str(error)
    return None if torch.equal(mapped, made) else "the mapping shows other values"


def _handed_over(fd: int) -> int:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with near, far:
        socket.send_fds(near, [b"x"], [fd])
        _, fds, _, _ = socket.recv_fds(far, 1, 1)
    if not fds:
        raise OSError("a Unix socket hands over no descriptors")
    return fds[0]


def judge_shared_memory(missing: str | None, choice: str) -> Verdict:
    """missing: what doesn't work, if anything."""
    if missing is None:
        return ok("memory files are made, handed over and mapped: the shm lane works on this host")
    mend = "use Linux 5.1 or newer, and a container whose seccomp profile allows memfd_create"
    if choice == "shm":
        return fail(
            f'{missing}, and lanes.choice = "shm" takes no other lane', f'{mend}, or set "auto"'
        )
    if choice == "auto":
        return warn(f"{missing}: workers beside a server use the slower tcp lane", mend)
    return ok(f'{missing}, which lanes.choice = "{choice}" does not need')
