"""A Ray cluster whose nodes are hosts of `network.py`: a head, and a raylet in each of the others.

Nodes share the machine's file system and nothing else: each has its address, its ports and its
temporary folder.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from asynception.hosts.namespaces import lacking
from asynception.hosts.network import Host, network

GCS_PORT, DASHBOARD_PORT = 6379, 8265
START_TIMEOUT_S = 300.0
START_ATTEMPTS = 3
POLL_S = 0.05
OBJECT_STORE_NUM_BYTES = 80 << 20
"""About the least that Ray takes: tensors never pass through it."""

NODE_DEATHS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "250",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "20",
}
"""Settings of the head with which a node that is killed counts as dead after 5 s, and one that is
cut off after 45 s; Ray's own need 15 s and a minute."""

_RAY = (sys.executable, "-m", "ray.scripts.scripts")

_RAYLET = "/raylet/raylet "

_ALIVE = """
import sys, time
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
while sum(node.state == 0 for node in client.get_all_node_info().values()) < int(sys.argv[2]):
    time.sleep(0.05)
"""
"""Returns when so many nodes are alive."""


@dataclass(frozen=True)
class NodeOptions:
    """What a node offers."""

    num_cpus: int = 1
    resources: Mapping[str, float] | None = None
    """Custom ones, by which actors can be sent to it."""


class RayNodes:
    """The nodes; the first is the head, where drivers run."""

    def __init__(
        self,
        hosts: Sequence[Host],
        options: Sequence[NodeOptions],
        folder: Path,
        environment: Mapping[str, str],
        dashboard: bool,
    ) -> None:
        """folder: holds what the nodes write, and is to be removed with them; a short path."""
        assert len(hosts) == len(options)
        self.hosts, self._options, self.folder = hosts, options, folder
        self._dashboard = dashboard
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder),  # of processes that are killed before they can tidy up
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            **environment,
        }
        """Of the nodes, and of programs on them."""

    @property
    def address(self) -> str:
        """Of the cluster, for `ray.address`."""
        return f"{self.hosts[0].address}:{GCS_PORT}"

    @property
    def dashboard_url(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self.hosts[0].address}:{DASHBOARD_PORT}"

    def start(self) -> None:
        """Start all nodes. Raises RuntimeError with what Ray says, and TimeoutError."""
        self._wait(0, self._launch(0))
        others = {number: self._launch(number) for number in range(1, len(self.hosts))}
        for number, started in others.items():
            self._wait(number, started)
        self.wait_for(len(self.hosts))

    def wait_for(self, num_nodes: int) -> None:
        """Until so many are alive. Raises subprocess.TimeoutExpired."""
        command = [sys.executable, "-c", _ALIVE, self.address, str(num_nodes)]
        in_head = self.hosts[0].namespace.command(command)
        subprocess.run(in_head, env=self.environment, check=True, timeout=START_TIMEOUT_S)

    def restart(self, number: int) -> None:
        """Start a node anew that was killed."""
        assert number > 0, "without its head there is no cluster"
        self._wait(number, self._launch(number))

    def kill(self, number: int) -> None:
        """SIGKILL to all processes of a host, at once."""
        self.hosts[number].namespace.kill()

    def is_up(self, number: int) -> bool:
        """Whether a host has its node. One that was cut off for too long ends when it returns."""
        return any(_RAYLET in _title(pid) for pid in self.hosts[number].namespace.pids())

    def command(self, number: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a host; give it `environment`."""
        return self.hosts[number].namespace.command(command)

    def pids(self, number: int, title: str) -> list[int]:
        """Of a host's processes whose title begins so, like ray::WorkerProcess; newest last."""
        pids = self.hosts[number].namespace.pids()
        return sorted((pid for pid in pids if _title(pid).startswith(title)), key=_started)

    def said(self, number: int) -> str:
        """What a host's actors and their libraries have said since its node began."""
        logs = sorted((self.folder / str(number)).glob("session_2*/logs/worker-*.err"))
        return "".join(log.read_text(errors="replace") for log in logs)

    def _launch(self, number: int) -> subprocess.Popen[bytes]:
        host, options = self.hosts[number], self._options[number]
        temporary = self.folder / str(number)
        shutil.rmtree(temporary, ignore_errors=True)  # Ray would show an earlier node's logs again
        command = [*_RAY, "start", f"--node-ip-address={host.address}", "--disable-usage-stats"]
        command += [f"--temp-dir={temporary}", f"--num-cpus={options.num_cpus}"]
        command += [f"--object-store-memory={OBJECT_STORE_NUM_BYTES}"]
        command += [f"--resources={json.dumps(dict(options.resources or {}))}"]
        if number > 0:
            command += [f"--address={self.address}"]
        else:
            command += ["--head", f"--port={GCS_PORT}", f"--include-dashboard={self._dashboard}"]
            command += [f"--dashboard-host={host.address}"] if self._dashboard else []
        with (self.folder / f"{number}.log").open("w") as said:
            return subprocess.Popen(
                host.namespace.command(command),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=said,  # a pipe would stay open as long as the node
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the node must not get the terminal's Ctrl-C
            )

    def _wait(self, number: int, started: "subprocess.Popen[bytes]") -> None:
        """Until a node runs; Ray itself gives a raylet no more than 30 s to start."""
        for _ in range(START_ATTEMPTS - 1):
            if self._code(started) == 0:
                return
            self.kill(number)
            started = self._launch(number)
        if code := self._code(started):
            said = (self.folder / f"{number}.log").read_text()
            raise RuntimeError(
                f"ray start on {self.hosts[number].address} ended with {code}: {said}"
            )

    def _code(self, started: "subprocess.Popen[bytes]") -> int:
        try:
            return started.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            started.kill()
            raise


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _started(pid: int) -> int:
    """When, in ticks since boot."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


@contextmanager
def ray_nodes(
    options: Sequence[NodeOptions],
    environment: Mapping[str, str] = NODE_DEATHS,
    dashboard: bool = False,
) -> Iterator[RayNodes]:
    """A running cluster of as many hosts as there are options.

    Behind the block everything is gone: processes, namespaces, temporary folders. SIGTERM, too, is
    met by that while it runs. Raises RuntimeError if this process lacks what it takes.
    """
    reason = lacking()
    if reason:
        raise RuntimeError(reason)
    with (
        _ended_by_sigterm(),
        tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True) as folder,
        network(len(options)) as hosts,
    ):
        nodes = RayNodes(hosts, options, Path(folder), environment, dashboard)
        nodes.start()
        yield nodes


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this program as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """Wait for something true; returns the seconds. Raises TimeoutError."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > timeout_s:
            raise TimeoutError(f"no {what} in {timeout_s:.0f} s")
        time.sleep(POLL_S)
    return time.monotonic() - began_s
