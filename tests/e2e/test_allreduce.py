"""Runs whose workers average gradients among themselves, and publish the state to the servers."""

import pytest
from conftest import BATCH_SIZE
from counter_model import counting, hurry
from processes import RUN_TIMEOUT_S, events, only, wait_for, wait_for_event

from ps.checkpoint import read_metadata

NUM_SERVERS = 2
SAMPLES = 64 * BATCH_SIZE
STEP_S = 0.5
"""Half of the steps, after which an evaluation is due, is then long before the last one."""
ALLREDUCE = {
    "consistency.mode": "allreduce",
    "consistency.publish_every_s": 0.5,
    "scaling.num_workers": 2,
    "training.samples": SAMPLES,
    "evaluation.every_epochs": 1,
    "checkpoint.every_epochs": 0.5,
}


def assert_all_trained(run, samples: int) -> None:
    result = run.result()
    assert (result["mode"], result["status"]) == ("allreduce", "finished")
    assert result["samples"] == samples
    assert result["staleness"]["max"] == 0
    # Two batches an update, but for the last ones of whichever worker was left alone.
    assert samples // BATCH_SIZE // 2 <= result["updates"] <= samples // BATCH_SIZE
    assert set(result["receipts"]) == {"applied", "accumulated"}, "nothing was lost"
    assert result["receipts"]["applied"] == NUM_SERVERS * result["updates"]
    assert sum(result["receipts"].values()) == NUM_SERVERS * samples // BATCH_SIZE
    last = read_metadata(run.path / "checkpoints" / run.checkpoints()[-1])
    assert (last["updates"], last["samples"]) == (result["updates"], samples)
    assert last["version_skew"] == 0


def test_a_run_evaluates_and_saves_what_is_published_and_goes_on_from_there(join, tmp_path):
    settings = counting(tmp_path, STEP_S) | ALLREDUCE
    run = join(settings)
    wait_for(lambda: run.metrics("eval"), RUN_TIMEOUT_S, "evaluation")
    hurry(tmp_path)
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    assert_all_trained(run, SAMPLES)
    points = [(point["samples"], point["updates"]) for point in run.metrics("eval")]
    assert len(points) >= 2
    assert points == sorted(points)
    assert points[-1] == (SAMPLES, run.result()["updates"])

    resumed = join(settings | {"training.samples": 2 * SAMPLES}, resume=True)
    outcome = resumed.wait()
    assert outcome.code == 0, str(outcome)
    assert_all_trained(resumed, 2 * SAMPLES)


@pytest.mark.long
def test_a_dead_worker_sends_the_group_back_to_the_last_checkpoint(join):
    samples = 8 * SAMPLES
    run = join(ALLREDUCE | {"training.samples": samples})
    wait_for(run.checkpoints, RUN_TIMEOUT_S, "checkpoint")
    only(run, "ray::RankProcess").kill()
    wait_for_event(run, "starting again from")
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    assert_all_trained(run, samples)
    result = run.result()
    assert (result["restarts"], result["worker_failures"]) == (1, 1)
    (event,) = (event for event in events(run) if "starting again from" in event)
    assert event.startswith("the group of workers was lost (worker ")
    resumed_from = int(event.rpartition("starting again from ")[2].split()[0])
    assert 0 < resumed_from < samples
