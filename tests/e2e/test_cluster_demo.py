"""`make cluster-demo` with the quickstart, for a short time: a job over three hosts, of which one
is killed and comes back."""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from processes import Command

from asynception.hosts.demo import JOB_SERVER
from asynception.hosts.namespaces import lacking, namespaces

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
    pytest.mark.skipif(
        importlib.util.find_spec(JOB_SERVER) is None,
        reason="ray[default] is not installed; make test-long runs this apart, with it",
    ),
    pytest.mark.timeout(900),
]

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
TIMEOUT_S = 800.0
"""It takes a minute; this is for machines that do much else."""

TRAINED_S = 40
"""Long enough for Ray to see a node's death, which takes it 5 s, and for the node to come back."""

SAID = (
    "--- ray job submit",
    "--- SIGKILL to all",
    "waits for room: its node is gone",
    "comes back",
    "succeeded",
    '--- {"status": "finished"',
    "--- hosts left on this machine: 0",
)
"""One after the other."""


@pytest.fixture
def short_folder():
    """Sockets lie in it, whose paths may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="demo-"))
    yield folder
    shutil.rmtree(folder)


def test_a_job_outlives_a_host_and_the_machine_is_left_clean(short_folder, tmp_path):
    command = [sys.executable, "-m", "asynception.hosts", f"--recipe={QUICKSTART}"]
    limits = ["--samples=1000000", f"--training.max_s={TRAINED_S}", "--run.log_every_s=1"]
    demo = Command(tmp_path / "demo", *command, *limits, env={"TMPDIR": str(short_folder)})
    outcome = demo.wait(TIMEOUT_S)
    assert outcome.code == 0, str(outcome)
    lines = outcome.stdout.splitlines()
    for text in SAID:
        found = next((number for number, line in enumerate(lines) if text in line), None)
        assert found is not None, (text, outcome)
        lines = lines[found:]
    (result,) = (line for line in outcome.stdout.splitlines() if line.startswith("--- {"))
    values = json.loads(result.removeprefix("--- "))
    assert values["worker_failures"] >= 1
    assert values["restarts"] == 0
    assert values["eval"]
    assert list(short_folder.iterdir()) == []
    assert not [name for name in namespaces() if name.endswith(f"-{demo.process.pid}")]
    assert not [name for name in os.listdir("/dev/shm") if "asynception" in name]
    demo.wait_until_gone()
