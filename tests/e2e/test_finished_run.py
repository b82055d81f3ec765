"""A run with 2 servers and 2 workers, from the command line to what it leaves."""

import math

import pytest
from conftest import BATCH_SIZE, SAMPLES
from processes import events, strict_json
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asynception.recipe import load_config
from ps.checkpoint import read_metadata

NUM_SERVERS = 2
METRICS = {"map@100", "loss"}


def test_the_result_has_what_is_promised(finished):
    result = finished.result()
    promised = ["status", "mode", "updates", "samples", "wall_s", "samples_per_s", "staleness"]
    assert {*promised, "eval", "baseline", "checkpoint"} <= set(result)
    assert (result["status"], result["mode"]) == ("finished", "async")
    assert result["samples"] == SAMPLES
    assert result["updates"] == SAMPLES // BATCH_SIZE
    assert result["samples_per_s"] == pytest.approx(SAMPLES / result["wall_s"], rel=1e-3)
    assert 1 < result["wall_s"] < 240
    assert set(result["eval"]) == set(result["baseline"]) == METRICS
    assert result["error"] is None


def test_the_end_says_what_held_the_run_up_and_leaves_its_status(finished):
    found = finished.result()["diagnosis"]
    assert found["bottleneck"] in ("compute", "data", "memory", "servers")
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert f"diagnosis: {found['text']}" in events(finished)
    status = strict_json((finished.path / "status.json").read_text())
    assert (status["status"], status["diagnosis"]) == ("finished", found)
    assert status["samples"] == status["total_samples"] == SAMPLES
    updates = SAMPLES // BATCH_SIZE
    assert [shard["version"] for shard in status["shards"]] == [updates] * NUM_SERVERS
    assert [shard["lanes"] for shard in status["shards"]] == [{"shm": updates}] * NUM_SERVERS
    assert sum(worker["pushes"] for worker in status["workers"]) == updates
    assert status["checkpoint"]["name"] == finished.checkpoints()[-1]
    assert status["evaluation"]["metrics"] == finished.result()["eval"]


def test_every_push_was_applied_once_at_every_shard(finished):
    result = finished.result()
    assert result["receipts"] == {"applied": result["updates"] * NUM_SERVERS}
    assert (result["worker_failures"], result["restarts"], result["corrupt_images"]) == (0, 0, 0)


def test_two_asynchronous_workers_see_each_other_as_staleness(finished):
    staleness = finished.result()["staleness"]
    assert set(staleness) == {"mean", "p50", "p99", "max"}
    assert 0 < staleness["mean"] <= staleness["max"] < SAMPLES // BATCH_SIZE
    assert 0 <= staleness["p50"] <= staleness["p99"] <= staleness["max"]
    histograms = finished.result()["staleness_histograms"]
    assert set(histograms["workers"]) == {"0", "1"}
    assert set(histograms["shards"]) == {str(shard) for shard in range(NUM_SERVERS)}
    for part in ("workers", "shards"):
        counts = [sum(each.values()) for each in histograms[part].values()]
        assert sum(counts) == sum(histograms["all"].values()) == NUM_SERVERS * SAMPLES // BATCH_SIZE


def test_the_ema_learned_what_the_colours_mean(finished):
    result = finished.result()
    learned, baseline = result["eval"], result["baseline"]
    assert baseline["map@100"] < 0.65
    assert learned["map@100"] > 0.8
    assert learned["loss"] < 0.7 * baseline["loss"]


def test_the_training_loss_falls(finished):
    losses = [point["loss"] for point in finished.metrics("train") if point["loss"] is not None]
    assert len(losses) >= 2
    assert losses[-1] < 0.7 * losses[0]


def test_the_command_prints_the_result(finished):
    text = finished.output.stdout
    assert strict_json(text[text.index("\n{\n") :]) == finished.result()
    assert "Traceback" not in text + finished.output.stderr


def test_metrics_hold_points_and_evaluations_in_order(finished):
    points, evaluations = finished.metrics("train"), finished.metrics("eval")
    samples = [point["samples"] for point in points]
    assert samples == sorted(samples)
    assert samples[-1] == points[-1]["pushes"] * BATCH_SIZE == SAMPLES
    assert len(evaluations) >= 2  # one midway, one at the end
    assert evaluations[-1]["samples"] == SAMPLES
    result = finished.result()
    assert evaluations[-1]["metrics"] == result["eval"]
    assert evaluations[-1]["baseline"] == result["baseline"]


def test_tensorboard_can_read_the_curves(finished):
    events = EventAccumulator(str(finished.path / "tensorboard")).Reload()
    losses = events.Scalars("train/loss")
    assert losses[-1].step == SAMPLES
    assert all(math.isfinite(event.value) for event in losses)
    final = events.Scalars("eval/map@100")[-1]
    assert final.step == SAMPLES
    assert math.isclose(final.value, finished.result()["eval"]["map@100"], rel_tol=1e-6)


def test_the_last_two_checkpoints_are_kept_whole(finished):
    names = finished.checkpoints()
    assert sorted(path.name for path in (finished.path / "checkpoints").iterdir()) == names
    assert len(names) == 2
    last = finished.path / "checkpoints" / names[-1]
    assert finished.result()["checkpoint"] == str(last)
    metadata = read_metadata(last)  # checks its checksum
    assert (metadata["updates"], metadata["samples"]) == (SAMPLES // BATCH_SIZE, SAMPLES)
    files = {"model.safetensors", "ema.safetensors", "slot.momentum.safetensors", "metadata.json"}
    assert {path.name for path in last.iterdir()} == files


def test_the_saved_config_is_the_one_that_was_run(finished, recipe):
    overrides = ["--run.name", "RUN", "--run.storage_path", str(finished.path.parent)]
    assert load_config(finished.path) == load_config(recipe, overrides)
    assert (finished.path / "config.toml").is_file()


def test_nothing_is_left_running(finished):
    finished.wait_until_gone()
