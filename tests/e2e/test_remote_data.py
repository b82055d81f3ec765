"""Runs whose shards lie behind a web server, known by their manifests alone."""

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pictures
import pytest
from click.testing import CliRunner
from processes import only, wait_for_event

from asynception.cli import main

pytestmark = pytest.mark.long

BATCH_SIZE = 16
NUM_SHARDS, IMAGES_PER_SHARD = 12, 40
EPOCH = NUM_SHARDS * IMAGES_PER_SHARD


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of training and held-out shards with their manifests."""
    folder = tmp_path_factory.mktemp("remote")
    train = list(pictures.multilabel(EPOCH, seed=2))
    val = list(pictures.multilabel(48, seed=3))
    pictures.write_shards(folder, "train", train, num_shards=NUM_SHARDS)
    pictures.write_shards(folder, "val", val, num_shards=1)
    for split in ("train", "val"):
        pattern, out = folder / f"{split}-*.tar", folder / f"{split}.manifest.json"
        result = CliRunner().invoke(
            main, ["data", "index", str(pattern), "--num-classes", "10", "--out", str(out)]
        )
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def served(shards: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A URL, and the folder behind it, which the test may change."""
    folder = tmp_path / "served"
    shutil.copytree(shards, folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def settings(served: tuple[str, Path], tmp_path: Path) -> dict[str, object]:
    url, _ = served
    return {
        "data.train": f"{url}/train.manifest.json",
        "data.val": f"{url}/val.manifest.json",
        "data.fetch.cache_dir": tmp_path / "cache",
        "data.fetch.attempts": 2,
        "data.fetch.backoff_s": 0.1,
        "data.shuffle_window": IMAGES_PER_SHARD,
        "evaluation.every_epochs": 100,
        "checkpoint.every_epochs": 100,
    }


def test_windows_are_leased_whole_and_a_death_loses_nothing(join, settings):
    """Twelve windows an epoch for two workers, so that each shard is one worker's."""
    num_epochs = 16
    run = join(settings | {"training.samples": num_epochs * EPOCH})
    run.wait_for_samples(3 * EPOCH)
    only(run, "ray::WorkerProcess").kill()
    wait_for_event(run, "died after")
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert (result["status"], result["samples"]) == ("finished", num_epochs * EPOCH)
    data = result["data"]
    assert data["samples_returned"] > 0
    assert data["samples_twice"] <= BATCH_SIZE
    # The dead worker held one lease in hand, one ahead, and those of the batches read ahead.
    assert num_epochs * NUM_SHARDS <= data["leases"] <= num_epochs * NUM_SHARDS + 6
    assert data["lost"] == {}


def test_a_lost_shard_ends_the_run_in_one_line(train, settings, served):
    _, folder = served
    (folder / "train-00003.tar").unlink()
    run = train(settings | {"training.samples": 2 * EPOCH})
    outcome = run.wait()
    assert outcome.code == 2, str(outcome)
    assert len(outcome.stderr.splitlines()) == 1, str(outcome)
    assert "train-00003.tar" in outcome.stderr
    assert "data.max_lost_shards" in outcome.stderr


def test_a_lost_shard_that_may_be_left_out_is_counted(join, settings, served):
    _, folder = served
    (folder / "train-00003.tar").unlink()
    run = join(settings | {"training.samples": 2 * EPOCH, "data.max_lost_shards": 1})
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert result["samples"] == 2 * EPOCH, "left out, they are done with"
    assert result["data"]["lost"] == {"train-00003.tar": 2 * IMAGES_PER_SHARD}
