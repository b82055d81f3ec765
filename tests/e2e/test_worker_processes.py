"""A worker of two processes loses first one of them, and later the other."""

import pytest
from conftest import BATCH_SIZE
from processes import events, only, wait_for, wait_for_event

pytestmark = pytest.mark.long

SAMPLES = 480 * BATCH_SIZE
NODE = {
    "training.samples": SAMPLES,
    "scaling.num_workers": 1,
    "scaling.processes_per_worker": 2,
    "scaling.num_servers": 1,
}
DEADLINE_S = 120.0


def test_a_worker_is_replaced_whole_whichever_of_its_processes_dies(join):
    run = join(NODE)
    run.wait_for_samples(SAMPLES // 8)
    follower, leader = processes_of(run)
    follower.kill()
    wait_for_event(run, "worker 0 lost its process 1")
    wait_for(lambda: not leader.is_running(), DEADLINE_S, "end of its process 0")
    run.wait_for_samples(SAMPLES // 2)
    follower, leader = processes_of(run)
    leader.kill()
    wait_for(lambda: not follower.is_running(), DEADLINE_S, "end of process 1")
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert (result["status"], result["samples"]) == ("finished", SAMPLES)
    assert (result["worker_failures"], result["restarts"]) == (2, 0)
    assert result["receipts"] == {"applied": result["updates"]}
    # Two batches a push, but for the last one of the last life.
    assert result["updates"] == SAMPLES // (2 * BATCH_SIZE)
    assert "each worker is 2 processes on one node" in events(run)[0]
    assert sum("died after" in event for event in events(run)) == 2


def processes_of(run):
    """Rank 1, then rank 0."""
    return [only(run, f"ray::NodeWorkerProcess.{name}") for name in ("follow", "lead")]
