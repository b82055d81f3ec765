"""Synchronous runs: every version is made of one gradient of each worker, deaths included."""

import pytest
from conftest import BATCH_SIZE
from processes import events, only, wait_for_event

SAMPLES = 64 * BATCH_SIZE
SYNC = {"consistency.mode": "sync", "training.samples": SAMPLES}


ENCRYPTED = {"security.tls": "auto", "lanes.choice": "tcp"}
ROUNDED = {"wire.pull": "bfloat16", "wire.push": "bfloat16", "wire.error_feedback": "true"}


def test_all_samples_are_trained_on_and_none_is_stale(join):
    """Encrypted, with numbers of two bytes on the way, and summed in the order of ranks, while one
    worker is slow and the other waits for it."""
    in_order = {"consistency.deterministic": "true"}
    workers = {"scaling.num_workers": 2, "scaling.slow_workers": "{1 = 6}"}
    run = join(SYNC | ENCRYPTED | ROUNDED | in_order | workers)
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert (result["mode"], result["status"]) == ("sync", "finished")
    assert result["samples"] == SAMPLES
    assert "lanes in use: tcp" in events(run)
    assert result["staleness"]["max"] == 0
    num_servers = 2
    # Two gradients an update, but for the last ones of whichever worker was left alone.
    assert SAMPLES // BATCH_SIZE // 2 <= result["updates"] <= SAMPLES // BATCH_SIZE
    assert result["receipts"]["applied"] == num_servers * result["updates"]
    assert set(result["receipts"]) == {"applied", "accumulated"}, "nothing was lost"
    assert sum(result["receipts"].values()) == num_servers * SAMPLES // BATCH_SIZE
    assert result["diagnosis"]["bottleneck"] == "others"
    assert result["diagnosis"]["stragglers"] == [1]


def test_a_dead_worker_is_waited_for_only_until_it_is_replaced(join):
    run = join(SYNC | {"scaling.num_workers": 2, "training.samples": 8 * SAMPLES})
    run.wait_for_samples(SAMPLES)
    only(run, "ray::WorkerProcess").kill()
    wait_for_event(run, "died after")
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert (result["status"], result["samples"]) == ("finished", 8 * SAMPLES)
    assert result["worker_failures"] == 1


@pytest.mark.long
def test_backup_workers_lose_work_which_is_counted(join):
    run = join(SYNC | {"scaling.num_workers": 2, "consistency.backup_workers": 1})
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert result["samples"] == SAMPLES
    assert sum(result["receipts"].values()) == 2 * SAMPLES // BATCH_SIZE
    assert result["receipts"].get("accumulated", 0) == 0
    assert result["receipts"]["applied"] + result["receipts"].get("stale", 0) == sum(
        result["receipts"].values()
    )
