"""A run whose data and checkpoints lie in a bucket, which refuses writes for a while."""

import json
import signal

import pictures
import pytest
import s3fs
from click.testing import CliRunner
from conftest import BATCH_SIZE
from counter_model import counting, hurry
from processes import RUN_TIMEOUT_S, events, wait_for, wait_for_event
from s3_server import BUCKET, S3Server, s3_server
from safetensors.torch import load_file

from asynception.cli import main

pytestmark = pytest.mark.long

EPOCH, VAL_IMAGES = 160, 48
SAMPLES = 50 * EPOCH
STEP_S = 0.5
NUM_TO_KEEP = 2
"""Of checkpoints, unless a recipe says otherwise."""


def whole_checkpoints(server: S3Server) -> list[str]:
    """Names of those in the bucket that have all their files, oldest first."""
    fs = s3fs.S3FileSystem(**server.options, skip_instance_cache=True)
    found = fs.glob(f"{BUCKET}/runs/RUN/checkpoint-*/metadata.json")
    return sorted(path.split("/")[3] for path in found)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """With shards and their manifests in its bucket."""
    folder = tmp_path_factory.mktemp("shards")
    sets = {"train": EPOCH, "val": VAL_IMAGES}
    with s3_server() as server:
        fs = s3fs.S3FileSystem(**server.options, skip_instance_cache=True)
        fs.mkdir(BUCKET)
        for split, num_images in sets.items():
            examples = list(pictures.multilabel(num_images, seed=num_images))
            pictures.write_shards(folder, split, examples, num_shards=2)
            out = folder / f"{split}.manifest.json"
            command("data", "index", folder / f"{split}-*.tar", "--num-classes", 10, "--out", out)
        fs.put(f"{folder}/", f"{BUCKET}/set/", recursive=True)
        yield server


def command(*words: object) -> str:
    """A command's standard output, in this process."""
    result = CliRunner().invoke(main, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def spelled(values: object) -> str:
    """As a setting on the command line."""
    if isinstance(values, dict):
        return "{" + ", ".join(f"{key} = {spelled(each)}" for key, each in values.items()) + "}"
    return json.dumps(values)


@pytest.fixture(scope="module")
def trained(server, join_module, tmp_path_factory):
    """The run: its bucket fails in the middle of a checkpoint, it is stopped, and resumed to its
    end. With its result when it was stopped."""
    folder = tmp_path_factory.mktemp("counter")
    options = spelled(server.options)
    settings = counting(folder, STEP_S) | {
        "data.train": f"s3://{BUCKET}/set/train.manifest.json",
        "data.val": f"s3://{BUCKET}/set/val.manifest.json",
        "data.fetch.cache_dir": tmp_path_factory.mktemp("cache"),
        "data.fetch.storage_options": options,
        "checkpoint.path": f"s3://{BUCKET}/runs",
        "checkpoint.storage_options": options,
        "checkpoint.every_epochs": 1,
        "training.samples": SAMPLES,
    }
    run = join_module(settings)

    def newest() -> int:
        """Updates in the newest checkpoint."""
        return int(max(whole_checkpoints(server), default="-0").split("-")[1])

    wait_for(lambda: newest() > 0, RUN_TIMEOUT_S, "checkpoint")
    server.writes_left = 1
    wait_for_event(run, "checkpoint failed, the earlier ones are whole")
    had = newest()
    server.writes_left = None
    wait_for(lambda: newest() > had, RUN_TIMEOUT_S, "checkpoint after the failure")
    run.signal_group(signal.SIGINT)
    assert run.wait().code == 130, str(run.output)
    stopped = run.result()
    hurry(folder)
    resumed = join_module(settings, resume=True)
    outcome = resumed.wait()
    assert outcome.code == 0, str(outcome)
    return resumed, stopped


def test_a_bucket_that_fails_costs_one_line_and_the_run_goes_on(trained):
    run, stopped = trained
    failures = [event for event in events(run) if "checkpoint failed" in event]
    assert failures
    assert all("s3://bucket/runs/RUN/checkpoint-" in event for event in failures)
    assert stopped["status"] == "interrupted"
    assert stopped["checkpoint"].startswith(f"s3://{BUCKET}/runs/RUN/checkpoint-")


def test_a_run_goes_on_from_its_bucket_and_every_push_is_in_the_last_checkpoint(trained, server):
    run, _ = trained
    result, updates = run.result(), SAMPLES // BATCH_SIZE
    assert result["status"] == "finished"
    assert (result["samples"], result["updates"]) == (SAMPLES, updates)
    kept = whole_checkpoints(server)
    assert len(kept) == NUM_TO_KEEP
    assert result["checkpoint"] == f"s3://{BUCKET}/runs/RUN/{kept[-1]}"
    # Behind that name stands a number where a periodic checkpoint was cut after the last push.
    assert kept[-1].startswith(f"checkpoint-{updates:09d}")
    assert result["data"]["samples_twice"] == 0


def test_what_is_in_the_bucket_can_be_evaluated_and_exported(trained, tmp_path):
    run, _ = trained
    told = json.loads(command("evaluate", run.path))
    assert told["checkpoint"] == run.result()["checkpoint"]
    assert told["eval"] == pytest.approx(run.result()["eval"], rel=1e-4)
    command("export", run.path, "--out", tmp_path / "model.safetensors")
    weight = load_file(tmp_path / "model.safetensors")["weight"]
    assert weight.unique().tolist() == [SAMPLES // BATCH_SIZE]
