"""A run over three hosts that are killed and cut off, with standbys of both servers, whose every
update is counted.

`benchmarks/faults.py` makes them of network namespaces, and injects the faults of docs/faults.md;
`test_deaths.py` kills workers and evaluators alone. After each fault the benchmark waits until only
the processes and sockets are there that the run needs.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import Command, Outcome, wait_for

from asynception.hosts.namespaces import lacking, namespaces

pytestmark = [
    pytest.mark.long,
    pytest.mark.alone,
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
    pytest.mark.timeout(900),
]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"
FAULTS = (
    "kill primary",
    "kill standby",
    "kill coordinator",
    "cut primary off",
    "stop worker",
    "kill host",
    "lose packets",
)
TIMEOUT_S = 800.0
"""It takes two to three minutes; this is for machines that do much else."""


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """Sockets lie in it, whose paths may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def counted(short_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """One run of all faults, in which the fastest may not get far ahead of the slowest."""
    chosen = [part for name in FAULTS for part in ("--fault", name)]
    options = ["--rounds", "1", "--together", "--mode", "bounded", "--replicas", "1", *chosen]
    folder = tmp_path_factory.mktemp("hosts")
    return Command(folder, sys.executable, str(SCRIPT), *options, env={"TMPDIR": str(short_folder)})


@pytest.fixture(scope="module")
def outcome(counted: Command) -> Outcome:
    ended = counted.wait(TIMEOUT_S)
    assert ended.code == 0, str(ended)
    return ended


@pytest.fixture(scope="module")
def row(outcome: Outcome) -> dict[str, Any]:
    (line,) = (line for line in outcome.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def test_no_update_is_lost_or_doubled_by_what_happens_to_hosts(row):
    assert row["injected"] == len(FAULTS)
    assert row["acknowledged"] > 0
    assert row["lost"] == row["declared_lost"] == 0
    assert row["doubled"] == row["declared"]


def test_every_fault_was_got_over(row, outcome):
    assert [*row["faults"]] == [*FAULTS]
    told = [line for line in outcome.stdout.splitlines() if "whole after" in line]
    assert [line.partition(":")[0] for line in told] == [*FAULTS]


def test_hosts_leave_nothing_behind(counted, outcome, short_folder):
    assert list(short_folder.iterdir()) == [], "Ray's folders and sockets lay there"
    assert not [name for name in namespaces() if name.endswith(f"-{counted.process.pid}")]
    assert not [path for path in os.listdir("/dev/shm") if "asynception" in path]
    wait_for(lambda: not mentioning(short_folder), 60.0, "end of all processes")


def mentioning(folder: Path) -> list[psutil.Process]:
    """Processes with the folder in their command line, as Ray's own have it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found
