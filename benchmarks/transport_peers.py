"""Other parameter servers on the same work, by scripts that lie outside of this repository.

`PEERS_DIR` holds the scripts, `BENCH_HOME` their environments; Ray and torch RPC also run in our
own. Every script starts its own processes and prints one line `RESULT {json}`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from measured_rows import Measured

from asynception.hosts.namespaces import Namespace

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Peer:
    """How to run one."""

    name: str
    script: str
    arguments: Sequence[str]
    environment: str
    """A folder in BENCH_HOME."""
    runs_in_ours: bool
    uses_sockets: bool
    keeps_system_tcp: bool = False
    """Whether it is to run with the system's congestion control; others get ours, reno."""


PEERS = (
    Peer("ray_tuned", "t_ray.py", ("--style", "tuned"), "venv-main", True, False),
    Peer("torchft", "t_torchft.py", (), "venv-ft", False, True),
    Peer("torchft_system_tcp", "t_torchft.py", (), "venv-ft", False, True, True),
    Peer("torch_rpc", "t_torch_rpc.py", ("--transport", "uv"), "venv-main", True, True),
    Peer("tensorflow", "t_tf.py", (), "venv-tf", False, True),
)


@dataclass(frozen=True)
class Runnable:
    """A peer with its interpreter and script."""

    peer: Peer
    python: Path
    script: Path


def find_peers(
    names: Sequence[str], folder: Path, home: Path
) -> tuple[list[Runnable], dict[str, str]]:
    """Those that can run, and why the others are skipped."""
    found, skipped = [], {}
    for peer in (peer for peer in PEERS if peer.name in names):
        script, python = folder / peer.script, home / peer.environment / "bin" / "python"
        if not python.exists() and peer.runs_in_ours:
            python = Path(sys.executable)
        if not script.is_file():
            skipped[peer.name] = f"there is no {script}: set PEERS_DIR"
        elif not python.exists():
            skipped[peer.name] = f"there is no {python}: set BENCH_HOME, or run setup.sh there"
        else:
            found.append(Runnable(peer, python, script))
    return found, skipped


def run_peer(
    runnable: Runnable,
    num_workers: int,
    num_parameters: int,
    seconds: float,
    namespace: Namespace | None,
) -> Measured | None:
    """Its updates/s and GB/s, both ways added; None if it fails, after a line that says so."""
    command = [str(runnable.python), runnable.script.name, *runnable.peer.arguments]
    command += ["--workers", str(num_workers), "--params", str(num_parameters)]
    command += ["--seconds", str(seconds), "--no-probe"]
    if namespace is not None:
        command = namespace.command(command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = _output(command, runnable.script.parent, environment)
    results = [line for line in output.splitlines() if line.startswith("RESULT ")]
    if not results:
        print(f"{runnable.peer.name}, {num_workers} workers: no result", file=sys.stderr)
        return None
    result = json.loads(results[-1].removeprefix("RESULT "))
    return {"updates_per_s": result["updates_per_s"], "gbps": result["gbps"]}


def _output(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """What a command and its children print; they are ended if it takes too long."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=TIMEOUT_S)[0]
    except subprocess.TimeoutExpired:
        return ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
