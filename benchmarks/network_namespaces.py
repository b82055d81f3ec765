"""Network namespaces, made and removed by iproute2: hosts of their own on one machine.

Needs root. Nothing outside is reached from one: it has a loopback device, and what is joined to it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


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


def run(*command: str) -> str:
    """Run a command and return what it prints. Raises CalledProcessError."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


def lacking() -> str | None:
    """What this process lacks to make namespaces, if anything."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc", "sysctl") if shutil.which(tool) is None]
    return f"there is no {' or '.join(missing)} (iproute2, procps)" if missing else None


@contextmanager
def namespace(label: str) -> Iterator[Namespace]:
    """A namespace with a loopback device; behind the block it is gone, with all processes in it.

    Its TCP congestion control, which is each namespace's own, is reno: every kernel has that, and
    it paces nothing.
    """
    made = Namespace(f"{label}-{os.getpid()}")
    run("ip", "netns", "add", made.name)
    try:
        made.run("ip", "link", "set", "lo", "up")
        made.run("sysctl", "-q", "-w", "net.ipv4.tcp_congestion_control=reno")
        yield made
    finally:
        _end_processes(made)
        run("ip", "netns", "delete", made.name)


def _end_processes(made: Namespace) -> None:
    """Those that a command in the namespace left behind."""
    for pid in run("ip", "netns", "pids", made.name).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
