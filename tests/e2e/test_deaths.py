"""Parts of a run, and then the whole of it, are killed with SIGKILL while they work."""

import contextlib
import shutil
import signal

import psutil
import pytest
from conftest import BATCH_SIZE, SAMPLES
from processes import RUN_TIMEOUT_S, TrainRun, events, only, strict_json, wait_for, wait_for_event

from asynception.recipe import load_config
from ps.checkpoint import read_metadata

DEADLINE_S = 120.0

SMALL_SAMPLES = SAMPLES // 2
SMALL = {
    "training.samples": SMALL_SAMPLES,
    "scaling.num_workers": 1,
    "scaling.num_servers": 1,
    "checkpoint.every_epochs": 0.5,
    "checkpoint.num_to_keep": 3,
}
"""For runs that are not about workers: fewer processes start faster, and half as much will do."""


def wait_for_checkpoint(run: TrainRun) -> None:
    wait_for(
        lambda: run.checkpoints() or run.process.poll() is not None, RUN_TIMEOUT_S, "checkpoint"
    )


def assert_whole(run, updates: int) -> None:
    """The last checkpoint holds the whole run, and nothing unfinished lies beside it."""
    last = run.path / "checkpoints" / run.checkpoints()[-1]
    metadata = read_metadata(last)
    assert (metadata["updates"], metadata["samples"]) == (updates, updates * BATCH_SIZE)
    assert run.checkpoints()[-1].startswith(f"checkpoint-{updates:09d}")
    assert run.result()["checkpoint"] == str(last)
    assert not list(run.path.glob("checkpoints/.incomplete-*"))


def assert_all_trained(run, samples: int) -> None:
    result = run.result()
    assert result["status"] == "finished"
    assert (result["samples"], result["updates"]) == (samples, samples // BATCH_SIZE)
    assert result["eval"]["loss"] < result["baseline"]["loss"]
    assert_whole(run, samples // BATCH_SIZE)


@pytest.fixture(scope="module")
def survivor(join_module):
    """A run that lost a worker in the middle, with pushes under way, then its coordinator and its
    evaluator."""
    pipeline = {"pipeline.overlap": "true", "pipeline.early_push": "true"}
    evaluation = {"evaluation.every_epochs": 0.1, "evaluation.raw": "true"}
    settings = evaluation | {"training.clip_norm": "none"}
    run = join_module(pipeline | settings)
    run.wait_for_samples(SAMPLES // 4)
    only(run, "ray::WorkerProcess").kill()
    wait_for_event(run, "died after")
    only(run, "ray::JournaledCoordinator").kill()
    only(run, "ray::EvaluatorProcess").kill()
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    return run


def test_a_killed_worker_is_replaced_and_its_samples_are_trained_on(survivor):
    assert_all_trained(survivor, SAMPLES)
    assert survivor.result()["worker_failures"] == 1
    assert survivor.result()["restarts"] == 0
    measured = survivor.result()["eval"]
    assert {"loss", "raw_loss"} < set(measured)
    assert measured["raw_loss"] != measured["loss"]
    (event,) = (event for event in events(survivor) if "died after" in event)
    assert "samples go back to be handed out" in event


def test_every_update_has_its_receipt_though_a_worker_died_with_some(survivor):
    result = survivor.result()
    # What had reached one of two shards when its worker died, of two pushes, is there once more.
    skew = read_metadata(survivor.path / "checkpoints" / survivor.checkpoints()[-1])["version_skew"]
    assert result["receipts"] == {"applied": 2 * result["updates"] + skew}
    assert skew <= 2


def test_what_a_death_did_to_the_data_is_counted(survivor):
    data = survivor.result()["data"]
    skew = read_metadata(survivor.path / "checkpoints" / survivor.checkpoints()[-1])["version_skew"]
    assert data["samples_twice"] == skew * BATCH_SIZE
    assert data["samples_returned"] > 0
    assert data["lost"] == {}
    # Leases of four batches, and what came back once more.
    assert SAMPLES // (4 * BATCH_SIZE) < data["leases"] < SAMPLES // (4 * BATCH_SIZE) + 9


def test_the_others_go_on_while_a_worker_is_replaced(survivor):
    points = survivor.metrics("train")
    samples = [point["samples"] for point in points]
    assert samples == sorted(samples)


def test_training_outlives_its_coordinator(survivor):
    """What it knew is counted once, see above; nothing of it is left."""
    assert len([event for event in events(survivor) if "the coordinator died" in event]) == 1
    assert not (survivor.path / ".coordinator.journal").exists()


def test_training_outlives_its_evaluator(survivor):
    given_up = [event for event in events(survivor) if "an evaluation was given up" in event]
    assert len(given_up) == 1
    assert survivor.metrics("eval")[-1]["samples"] == SAMPLES
    assert survivor.metrics("eval")[-1]["metrics"] == survivor.result()["eval"]


@pytest.fixture(scope="module")
def failed(train_module):
    """A run that lost its server midway, and may not start again."""
    run = train_module({**SMALL, "run.name": "SERVER", "failure.max_failures": 0})
    wait_for_checkpoint(run)
    only(run, "ray::ServerProcess").kill()
    run.wait()
    return run


def test_without_restarts_a_killed_server_fails_the_run(failed):
    outcome = failed.output
    assert outcome.code == 1, str(outcome)
    assert len(outcome.stderr.splitlines()) == 1
    assert outcome.stderr.startswith("error: ")
    assert "failure.max_failures = 0" in outcome.stderr
    assert "--resume" in outcome.stderr
    assert "Traceback" not in outcome.stdout
    failed.wait_until_gone()


@pytest.fixture(scope="module")
def restarted(failed, train_module):
    """What the failed run left, and its continuation, in which a server is killed again."""
    before = failed.result(), failed.checkpoints()[-1]
    run = train_module({**SMALL, "run.name": "SERVER"}, resume=True)
    wait_for(lambda: run.checkpoints()[-1] > before[1], DEADLINE_S, "new checkpoint")
    only(run, "ray::ServerProcess").kill()
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    return before, run


def test_a_failed_run_says_what_its_last_checkpoint_holds(restarted):
    (result, checkpoint), run = restarted
    assert result["status"] == "failed"
    assert "failure.max_failures" in result["error"]
    assert result["checkpoint"] == str(run.path / "checkpoints" / checkpoint)
    assert 0 < result["samples"] < SMALL_SAMPLES
    assert checkpoint.startswith(f"checkpoint-{result['updates']:09d}")


def test_a_killed_server_sends_the_run_back_to_its_last_checkpoint(restarted):
    (before, _), run = restarted
    assert_all_trained(run, SMALL_SAMPLES)
    result = run.result()
    assert (result["restarts"], result["worker_failures"], result["error"]) == (1, 0, None)
    (event,) = (event for event in events(run) if "starting again from" in event)
    resumed_from = int(event.rpartition("starting again from ")[2].split()[0])
    assert before["samples"] < resumed_from < SMALL_SAMPLES
    run.wait_until_gone()


def test_what_was_undone_with_a_server_is_not_counted(restarted):
    _, run = restarted
    assert run.result()["receipts"] == {"applied": SMALL_SAMPLES // BATCH_SIZE}


@pytest.fixture(scope="module")
def killed(train_module):
    """A run whose driver, and so the whole run, is killed midway, and that had half written one
    checkpoint more."""
    run = train_module({**SMALL, "scaling.num_servers": 2, "run.name": "DRIVER"})
    wait_for_checkpoint(run)
    run.process.kill()
    assert run.wait().code == -signal.SIGKILL
    wait_for(lambda: not run.titled("ray::WorkerProcess"), DEADLINE_S, "end of workers")
    wait_for(lambda: not run.titled("ray::ServerProcess"), DEADLINE_S, "end of servers")
    checkpoints = run.path / "checkpoints"
    half = checkpoints / ".incomplete-checkpoint-000000001"
    shutil.copytree(checkpoints / run.checkpoints()[-1], half, dirs_exist_ok=True)
    return run


def test_a_killed_run_is_resumed_on_other_servers_to_the_same_number_of_samples(
    killed, train_module
):
    assert not (killed.path / "result.json").exists()
    saved = read_metadata(killed.path / "checkpoints" / killed.checkpoints()[-1])
    assert 0 < saved["updates"] < SMALL_SAMPLES // BATCH_SIZE
    before = (killed.path / "metrics.jsonl").read_bytes()
    settings = {**SMALL, "scaling.num_servers": 3, "run.name": "DRIVER"}
    resumed = train_module(settings, resume=True)
    outcome = resumed.wait()
    assert outcome.code == 0, str(outcome)
    assert_all_trained(resumed, SMALL_SAMPLES)
    assert load_config(resumed.path).scaling.num_servers == 3
    after = (resumed.path / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    new = [line for line in resumed.metrics("train") if line not in metrics_in(before)]
    assert saved["samples"] <= new[0]["samples"] < SMALL_SAMPLES
    assert new[-1]["time_s"] > saved["extra"]["wall_s"]


def metrics_in(text: bytes) -> list[dict[str, object]]:
    """Its whole lines: the last one may be cut short."""
    return [strict_json(line) for line in text.decode().split("\n")[:-1]]


def test_the_processes_of_a_killed_run_disappear(killed):
    def others() -> list[psutil.Process]:
        return [p for p in killed.processes() if not is_ray_agent(p)]

    wait_for(lambda: not others(), DEADLINE_S, "end of the killed run's processes")


def is_ray_agent(process: psutil.Process) -> bool:
    """Helpers of Ray's own, which outlive a killed raylet by a minute; conftest.py waits for it."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[0] in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    return True
