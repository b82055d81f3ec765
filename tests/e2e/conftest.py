"""Tiny pictures, one finished run that many tests read, and a check that nothing stays behind."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pictures
import pytest
from clusters import Cluster, JoinedRun
from processes import STARTED, TrainRun

RECIPE = """
[model]
name = "xception"
width = 0.05
middle_blocks = 1

[data]
train = "pictures/train-*.tar"
val = "pictures/val-*.tar"
image_size = 32
batch_size = 16
lease_batches = 4
cache_images_mb = 10

[training]
samples = 15360
clip_norm = 5.0

[schedule]
kind = "cosine"
lr = 0.05
length = 32

[ema]
decay = 0.95
warmup = true

[evaluation]
every_epochs = 8

[scaling]
num_workers = 2
num_servers = 2

[checkpoint]
every_epochs = 1

[run]
log_every_s = 0.1
"""

TRAIN_IMAGES, VAL_IMAGES = 480, 64
SAMPLES, BATCH_SIZE = 15360, 16

RAY_HELPERS_TIMEOUT_S = 120.0
"""Two helpers of Ray's own outlive a raylet that was killed by a minute (a timeout of theirs)."""


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    for command in STARTED:
        try:
            command.wait_until_gone(RAY_HELPERS_TIMEOUT_S)
        finally:
            command.kill_all()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the pictures and the recipe."""
    folder = tmp_path_factory.mktemp("e2e")
    train = list(pictures.multilabel(TRAIN_IMAGES, seed=0))
    val = list(pictures.multilabel(VAL_IMAGES, seed=1))
    pictures.write_shards(folder / "pictures", "train", train, num_shards=3)
    pictures.write_shards(folder / "pictures", "val", val, num_shards=1)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="session")
def recipe(folder: Path) -> Path:
    """Multilabel, 32 epochs, 2 servers, 2 workers: some seconds once everything has started."""
    return folder / "recipe.toml"


@pytest.fixture(scope="session")
def cluster(
    _nothing_left_running: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A Ray for all runs that join it, which a run by itself would have to start and end."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.end()


@pytest.fixture
def train(recipe: Path, tmp_path: Path) -> Iterator[Callable[..., TrainRun]]:
    """Starts the recipe's run with other settings, and a Ray of its own.

    What is left at the end is killed. For tests of how processes start and end; others have
    `join`, which is quicker.
    """
    yield from _starting(partial(TrainRun, tmp_path, recipe))


@pytest.fixture
def join(recipe: Path, tmp_path: Path, cluster: Cluster) -> Iterator[Callable[..., TrainRun]]:
    """`train` in the Ray that is there; nothing of the run may be left in it."""
    yield from _starting(partial(JoinedRun, cluster, tmp_path, recipe))
    cluster.wait_until_idle()


@pytest.fixture(scope="module")
def train_module(
    recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., TrainRun]]:
    """`train`, for fixtures that serve a whole module."""
    yield from _starting(partial(TrainRun, tmp_path_factory.mktemp("runs"), recipe))


@pytest.fixture(scope="module")
def join_module(
    recipe: Path, tmp_path_factory: pytest.TempPathFactory, cluster: Cluster
) -> Iterator[Callable[..., TrainRun]]:
    """`join`, for fixtures that serve a whole module."""
    yield from _starting(partial(JoinedRun, cluster, tmp_path_factory.mktemp("joined"), recipe))
    cluster.wait_until_idle()


def _starting(command: Callable[..., TrainRun]) -> Iterator[Callable[..., TrainRun]]:
    started: list[TrainRun] = []

    def start(settings: dict[str, object], *, resume: bool = False) -> TrainRun:
        run = command(settings, resume=resume)
        started.append(run)
        return run

    yield start
    for run in started:
        if run.process.poll() is None:
            run.kill_all()


@pytest.fixture(scope="session")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """The recipe's run, at its end. Tests only read it."""
    run = TrainRun(tmp_path_factory.mktemp("finished"), recipe, {})
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    return run
