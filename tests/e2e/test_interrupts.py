"""What a run does when it is told to stop."""

import signal
from pathlib import Path

import pytest
from conftest import SAMPLES
from processes import GONE_TIMEOUT_S, RUN_TIMEOUT_S, wait_for

pytestmark = pytest.mark.alone  # for what it finds in shared memory

SHARED_MEMORY = Path("/dev/shm")
LONG = 100 * SAMPLES
ALONE = {
    "training.samples": LONG,
    "scaling.num_workers": 1,
    "scaling.num_servers": 1,
    "checkpoint.every_epochs": 0.5,
}


@pytest.fixture(scope="module", params=["SIGINT", "SIGTERM"])
def stopped(request, train_module):
    """A run that was stopped midway: by Ctrl-C, as a terminal does it, or as a scheduler does."""
    before = set(SHARED_MEMORY.iterdir())
    run = train_module({**ALONE, "run.name": request.param})
    wait_for(
        lambda: run.checkpoints() or run.process.poll() is not None, RUN_TIMEOUT_S, "checkpoint"
    )
    if request.param == "SIGINT":
        run.signal_group(signal.SIGINT)
    else:
        run.process.terminate()
    run.wait()
    return run, before


def test_the_exit_code_tells_of_the_signal_and_one_line_says_so(stopped):
    run, _ = stopped
    outcome = run.output
    assert outcome.code == {"SIGINT": 130, "SIGTERM": 143}[run.path.name]
    assert run.path.name in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert outcome.stderr.startswith("error: ")
    assert "Traceback" not in outcome.stdout


def test_no_process_is_left(stopped):
    run, _ = stopped
    run.wait_until_gone()


def test_no_shared_memory_is_left(stopped):
    _, before = stopped
    wait_for(lambda: set(SHARED_MEMORY.iterdir()) <= before, GONE_TIMEOUT_S, "end of it")


def test_the_result_says_what_the_last_checkpoint_holds(stopped):
    run, _ = stopped
    result = run.result()
    assert result["status"] == "interrupted"
    assert 0 < result["samples"] < LONG
    assert result["checkpoint"] == str(run.path / "checkpoints" / run.checkpoints()[-1])
    assert not list(run.path.glob("checkpoints/.incomplete-*"))
