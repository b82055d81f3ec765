"""Memory for the vectors, and /dev/shm for Ray's object store."""

import os
from dataclasses import dataclass
from pathlib import Path

from asynception.cluster import OBJECT_STORE_NUM_BYTES
from asynception.doctor import container
from asynception.doctor.finding import Verdict, fail, ok, warn

RAY_SHARE = 0.3
"""Of a node's memory, which `ray start` takes for its object store."""

_SPARE = 0.8
"""More than this share of the memory leaves little for activations, images and the page cache."""


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    total: int
    """Of the machine."""
    limit: int | None
    """Of the container."""
    available: int
    """That could be taken now, of both."""

    @property
    def most(self) -> int:
        """What processes here can use at all."""
        return self.total if self.limit is None else min(self.total, self.limit)


def read_memory() -> Memory:
    """Of this machine and container."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
    available, limit = sizes["MemAvailable:"], container.memory_limit()
    if limit is not None:
        available = min(available, limit - (container.memory_used() or 0))
    return Memory(sizes["MemTotal:"], limit, max(0, available))


def measure_memory(needed: int) -> Verdict:
    """needed: bytes of all processes that will run here; 0 if unknown."""
    return judge_memory(read_memory(), needed)


def judge_memory(memory: Memory, needed: int) -> Verdict:
    """Page cache counts as used in a container, though it gives way: so that only warns."""
    bound = f"{_gb(memory.most)}{'' if memory.limit is None else ' (limit of the container)'}"
    found = f"{_gb(memory.available)} free of {bound}"
    if not needed:
        return ok(found)
    found += f"; the recipe takes {_gb(needed)} here, activations and images not counted"
    mend = "lower scaling.num_workers, add memory or nodes, or raise the container's limit"
    if needed > memory.most:
        return fail(found, mend)
    if needed > memory.available or needed > _SPARE * memory.most:
        return warn(found, f"end what else runs here, or {mend}")
    return ok(found)


def measure_object_store(in_cluster: bool) -> Verdict:
    """in_cluster: whether this node's Ray was started by `ray start`, or will be by the run."""
    wanted = int(RAY_SHARE * read_memory().most) if in_cluster else OBJECT_STORE_NUM_BYTES
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return judge_object_store(None, 0, wanted)
    size = status.f_frsize * status.f_blocks if os.access("/dev/shm", os.W_OK) else None
    return judge_object_store(size, status.f_frsize * status.f_bavail, wanted)


def judge_object_store(size: int | None, free: int, wanted: int) -> Verdict:
    """size: bytes of /dev/shm; None if it is missing or can't be written to. Lanes don't use it."""
    mend = f"give the container at least {_gb(wanted)} (--shm-size), or empty /dev/shm"
    if size is None:
        return fail("no /dev/shm to write to: Ray's object store goes to the disk in /tmp", mend)
    found = f"{_gb(free)} free of {_gb(size)}"
    if free < wanted:
        return warn(f"{found}; Ray takes {_gb(wanted)} by default, or else the disk in /tmp", mend)
    return ok(found)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
