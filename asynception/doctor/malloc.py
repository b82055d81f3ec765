"""Whether the allocator can be told to keep large blocks (ps/malloc.py), and then does."""

from pathlib import Path

from asynception.doctor import malloc_probe
from asynception.doctor.apart import measure_apart
from asynception.doctor.finding import Verdict, ok, warn

LIMIT_S = 15.0

_MEND = (
    "use a Python on glibc, without LD_PRELOAD of another allocator; the shm and tcp lanes don't"
    " depend on it"
)


def measure_malloc() -> Verdict:
    seen = measure_apart(Path(malloc_probe.__file__), LIMIT_S)
    return judge_malloc(bool(seen["taken"]), int(seen["first"]), int(seen["again"]))


def judge_malloc(taken: bool, first: int, again: int) -> Verdict:
    """first, again: page faults of two blocks of 64 MB, the second after the first was freed."""
    if not taken:
        return warn("this allocator takes no options: gRPC streams at about half speed", _MEND)
    if 2 * again > first:
        return warn(
            f"large blocks are not kept, though mallopt took the options: {first} page faults,"
            f" then {again} again",
            _MEND,
        )
    return ok(f"large blocks are kept: {first} page faults, then {again}")
