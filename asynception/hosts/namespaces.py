"""Network namespaces, made and removed by iproute2: hosts of their own on one machine.

Needs root. Nothing outside is reached from one: it has a loopback device, and what is joined to it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PREFIX = "asynception"
FOLDER = Path("/run/netns")
"""Where iproute2 keeps names of namespaces."""

END_TIMEOUT_S = 30.0
"""For killed processes to be gone; one that waits for a disk can take a while."""


@dataclass(frozen=True)
class Namespace:
    """One that exists."""

    name: str

    def command(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` in it."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(self, *command: str) -> str:
        """Run a command in it to its end. Raises CalledProcessError."""
        return run(*self.command(command))

    def pids(self) -> list[int]:
        """Processes that live in it."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.name).split()]

    def kill(self) -> None:
        """SIGKILL to all processes in it, and to those that they start meanwhile.

        Returns when none is left. Raises TimeoutError.
        """
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while pids := self.pids():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"processes {pids} in {self.name} outlived SIGKILL")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def run(*command: str) -> str:
    """Run a command and return what it prints. Raises CalledProcessError."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


def lacking() -> str | None:
    """What this process lacks to make namespaces, if anything."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc", "sysctl", "umount") if shutil.which(tool) is None]
    return f"there is no {' or '.join(missing)} (iproute2, procps)" if missing else None


@contextmanager
def namespace(label: str) -> Iterator[Namespace]:
    """A namespace with a loopback device; behind the block it is gone, with all processes in it.

    Its TCP congestion control, which is each namespace's own, is reno: every kernel has that, and
    it paces nothing.
    """
    made = Namespace(f"{PREFIX}-{label}-{os.getpid()}")
    run("ip", "netns", "add", made.name)
    try:
        made.run("ip", "link", "set", "lo", "up")
        made.run("sysctl", "-q", "-w", "net.ipv4.tcp_congestion_control=reno")
        yield made
    finally:
        _remove(made)


def _remove(made: Namespace) -> None:
    try:
        made.kill()
    finally:
        run("ip", "netns", "delete", made.name)


@contextmanager
def mounts_as_before() -> Iterator[None]:
    """Undo the mount that iproute2 makes for a machine's first namespace, unless others use it."""
    was_there = _is_mounted()
    try:
        yield
    finally:
        if not was_there and _is_mounted():
            # It is busy while there is any namespace, and then stays.
            subprocess.run(["umount", str(FOLDER)], check=False, stderr=subprocess.DEVNULL)


def _is_mounted() -> bool:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(FOLDER) for line in mounts)


def sweep() -> list[str]:
    """Remove what programs left that were themselves killed; returns the namespaces' names."""
    left = [name for name in namespaces() if not _is_alive(int(name.rpartition("-")[2]))]
    return [name for name in left if _is_removed_here(name)]


def _is_removed_here(name: str) -> bool:
    """Remove a namespace; False if another program has done so meanwhile."""
    try:
        _remove(Namespace(name))
    except subprocess.CalledProcessError:
        if name in namespaces():
            raise
        return False
    return True


def namespaces() -> list[str]:
    """Names of those that this module made, here or in another process."""
    names = [line.split()[0] for line in run("ip", "netns", "list").splitlines()]
    ours = (name for name in names if name.startswith(f"{PREFIX}-"))
    return [name for name in ours if name.rpartition("-")[2].isdecimal()]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
