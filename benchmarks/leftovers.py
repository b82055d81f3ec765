"""What a run, and hosts, leave behind: processes, sockets, namespaces, mounts, shared memory."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from asynception.hosts.namespaces import namespaces
from asynception.hosts.ray_nodes import RayNodes

SHARED_MEMORY = Path("/dev/shm")
MAKERS = ("asynception", "plasma", "psm_", "sem.mp-", "torch_")
"""How names begin there that we, Ray, Python and torch give; others use it as a disk."""

TITLES = (
    "ray::WorkerProcess",
    "ray::ServerProcess",
    "ray::EvaluatorProcess",
    "ray::JournaledCoordinator",
)
"""Of a run's processes; those in between are Ray's own."""


def actors(nodes: RayNodes) -> dict[str, int]:
    """How many processes of each title the hosts have."""
    hosts = range(len(nodes.hosts))
    counts = {title: sum(len(nodes.pids(host, title)) for host in hosts) for title in TITLES}
    return {title: count for title, count in counts.items() if count}


def lane_sockets(nodes: RayNodes) -> int:
    """Sockets in which servers wait for callers of their host: abstract names, each host's own."""
    listening = 0
    for host in nodes.hosts:
        lines = host.namespace.run("ss", "-xlnH").splitlines()
        listening += sum("@asynception-" in line for line in lines)
    return listening


@dataclass(frozen=True)
class Before:
    """What this machine had before there were hosts."""

    mounts: frozenset[str] = field(default_factory=lambda: frozenset(_mounts()))
    shared: frozenset[str] = field(default_factory=lambda: frozenset(os.listdir(SHARED_MEMORY)))

    def left(self, *folders: Path) -> list[str]:
        """What this program has left, that had its hosts' files in these, each in words."""
        own = f"-{os.getpid()}"
        left = [f"namespace {name}" for name in namespaces() if name.endswith(own)]
        new = _mounts() - self.mounts
        ours = (own, *map(str, folders))
        left += [f"mount {path}" for path in new if path.endswith(ours)]
        left += [f"process {pid}" for folder in folders for pid in _mentioning(folder)]
        left += [f"shared memory {name}" for name in self._shared_files()]
        return left

    def _shared_files(self) -> set[str]:
        """New ones that nobody has mapped. Others on this machine may have their own."""
        there = {name for name in os.listdir(SHARED_MEMORY) if name.startswith(MAKERS)}
        new = there - self.shared
        return {name for name in new if not _is_mapped(SHARED_MEMORY / name)} if new else set()


def _mounts() -> set[str]:
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def _mentioning(folder: Path) -> list[int]:
    """Processes with the folder in their command line, as Ray's own have it."""
    mark = os.fsencode(folder)
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (each / "cmdline").read_bytes() and int(each.name) != os.getpid():
                found.append(int(each.name))
        except OSError:
            continue  # it has ended
    return found


def _is_mapped(path: Path) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if str(path) in maps.read_text():
                return True
        except OSError:
            continue
    return False
