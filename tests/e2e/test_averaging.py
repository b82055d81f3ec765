"""Runs in which workers train by themselves and the servers average their parameters."""

import pytest
from conftest import BATCH_SIZE
from counter_model import counting, hurry, num_training
from processes import RUN_TIMEOUT_S, only, wait_for, wait_for_event

NUM_SERVERS = 2
SAMPLES = 64 * BATCH_SIZE
STEP_S = 10.0
AVERAGING = {
    "consistency.mode": "averaging",
    "scaling.num_workers": 2,
    "schedule.length": 40,
    "schedule.lr": 0.02,
}


def test_parameters_are_averaged_every_few_steps(join):
    run = join(AVERAGING | {"consistency.local_steps": 4, "training.samples": SAMPLES})
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert (result["mode"], result["status"]) == ("averaging", "finished")
    assert result["samples"] == SAMPLES
    pushes = sum(result["receipts"].values()) / NUM_SERVERS
    # Whole groups of four, but for the last one of each worker.
    assert SAMPLES // BATCH_SIZE // 4 <= pushes <= SAMPLES // BATCH_SIZE // 4 + 2
    assert set(result["receipts"]) == {"applied", "accumulated"}, "nothing was lost"
    assert result["receipts"]["applied"] == NUM_SERVERS * result["updates"]
    assert result["staleness"]["max"] == 0


@pytest.mark.long
def test_without_a_number_of_steps_there_is_one_average_at_the_end(join, tmp_path):
    run = join(counting(tmp_path, STEP_S) | AVERAGING | {"training.samples": SAMPLES})
    # Or else the first to begin may have done it all by the time the other one does.
    wait_for(lambda: num_training(tmp_path) == 2, RUN_TIMEOUT_S, "two workers that train")
    hurry(tmp_path)
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert (result["samples"], result["updates"]) == (SAMPLES, 1)
    assert sum(result["receipts"].values()) == 2 * NUM_SERVERS


@pytest.mark.long
def test_what_a_dead_worker_did_since_its_last_push_is_done_again(join):
    run = join(AVERAGING | {"consistency.local_steps": 3, "training.samples": 8 * SAMPLES})
    run.wait_for_samples(SAMPLES)
    only(run, "ray::WorkerProcess").kill()
    wait_for_event(run, "died after")
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert (result["status"], result["samples"]) == ("finished", 8 * SAMPLES)
    assert result["worker_failures"] == 1
    assert result["data"]["samples_returned"] > 0
