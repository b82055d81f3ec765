"""What users get wrong: one clear line, exit code 2, nothing left running, no folder left."""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pictures
import pytest
import ray
from click.testing import CliRunner
from processes import PROGRAM, Command, Outcome, TrainRun, train_words

from asynception.cli import main

AT_A_TIME = 2
COMMANDS = (
    "unknown key in the recipe",
    "more CPUs than there are",
    "more memory than there is",
    "images too small",
    "storage that can't be written",
    "cluster that doesn't answer",
)
"""Those for which the whole command is run: what starts Ray, and one of each step before."""
DEADLINE_S = 240.0
UNREACHABLE_DEADLINE_S = 30.0
"""For a cluster that doesn't answer, on top of what the program takes to start."""


@dataclass(frozen=True)
class Mistake:
    """Settings on top of the recipe, and what the line must say of them."""

    says: tuple[str, ...]
    settings: dict[str, object] = field(default_factory=dict)
    swap: tuple[str, str] = ("", "")
    """Text of the recipe, and what stands there instead."""
    resume: bool = False


MISTAKES = {
    "unknown key in the recipe": Mistake(
        ("data.bach_size", "did you mean data.batch_size?"), swap=("batch_size", "bach_size")
    ),
    "unknown section": Mistake(("optimiser", "optimizer"), {"optimiser.name": "sgd"}),
    "unknown option": Mistake(
        ("training.epoch", "did you mean training.epochs?"), {"training.epoch": 3}
    ),
    "unknown model setting": Mistake(("widht", "width"), {"model.widht": 1}),
    "wrong type": Mistake(("data.batch_size", "'many'"), {"data.batch_size": "many"}),
    "out of bounds": Mistake(("scaling.num_workers", "0"), {"scaling.num_workers": 0}),
    "recipe is not TOML": Mistake(("is not valid TOML",), swap=("[model]", "[model")),
    "more servers than fit": Mistake(
        ("scaling.num_servers = 1000000", "1 to"), {"scaling.num_servers": 1000000}
    ),
    "more CPUs than there are": Mistake(
        ("10000 CPU", "scaling.num_workers"),
        {"scaling.num_workers": 1, "scaling.resources_per_worker.CPU": 10000},
    ),
    "more memory than there is": Mistake(
        ("GB of memory",), {"scaling.resources_per_server.memory": 10**15}
    ),
    "missing data": Mistake(("data.train", "/nowhere", "exist"), {"data.train": "/nowhere"}),
    "missing held-out data": Mistake(("data.val", "/nowhere"), {"data.val": "/nowhere/*.tar"}),
    "empty data folder": Mistake(("data.train", "empty"), {"data.train": "EMPTY"}),
    "label out of range": Mistake(("data.num_classes=5", "label"), {"data.num_classes": 5}),
    "softmax of several labels": Mistake(
        ("softmax", "one label", "multilabel"), {"training.objective": "softmax"}
    ),
    "weights that aren't there": Mistake(
        ("/nowhere.safetensors", "can't be read"), {"model.weights": "/nowhere.safetensors"}
    ),
    "a factory without a function": Mistake(
        ("model.factory", "FILE.py:build", "defines no function"),
        {"model.factory": "FILE.py:build"},
    ),
    "no one to wait for": Mistake(
        ("consistency.backup_workers = 2", "scaling.num_workers = 2"),
        {"consistency.mode": "sync", "consistency.backup_workers": 2},
    ),
    "a library that isn't there": Mistake(("timm", "NAMELESS"), {"model.name": "timm:NAMELESS"}),
    "segments that don't divide": Mistake(("segments = 3",), {"model.segments": 3}),
    "a width of zero": Mistake(("fc_widths", "0"), {"model.fc_widths": "[64, 0]"}),
    "images too small": Mistake(("6x6", "7x7"), {"data.image_size": 6}),
    "name with a slash": Mistake(("run.name",), {"run.name": "../x"}),
    "nothing to resume": Mistake(("no run to resume", "run.name"), resume=True),
    "storage that can't be written": Mistake(
        ("run.storage_path", "FILE"), {"run.storage_path": "FILE/runs"}
    ),
    "cluster that doesn't answer": Mistake(
        ("ray.address = 127.0.0.1:9",), {"ray.address": "127.0.0.1:9"}
    ),
}


def prepare(mistake: Mistake, folder: Path, recipe: Path) -> Path:
    """The folder that the command is for, and in it the recipe, which is returned."""
    (folder / "EMPTY").mkdir(parents=True)
    (folder / "FILE").touch()
    (folder / "FILE.py").touch()
    written = folder / "recipe.toml"
    text = recipe.read_text().replace('"pictures/', f'"{recipe.parent}/pictures/')
    written.write_text(text.replace(*mistake.swap, 1) if mistake.swap[0] else text)
    return written


def commit(mistake: Mistake, folder: Path, recipe: Path) -> TrainRun:
    """Run the command to its end; leave nothing behind."""
    written = prepare(mistake, folder, recipe)
    run = TrainRun(folder, written, mistake.settings, resume=mistake.resume)
    run.wait(DEADLINE_S)
    return run


@pytest.fixture(scope="module")
def mistaken(request, recipe, tmp_path_factory):
    """The commands of all mistakes that are to be tested, a few at a time."""
    chosen = {
        getattr(item, "callspec", None) and item.callspec.id for item in request.session.items
    }
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        runs: dict[str, Future[TrainRun]] = {}
        for number, name in enumerate(COMMANDS):
            if name in chosen:
                folder = tmp_path_factory.getbasetemp() / f"mistake{number}"
                runs[name] = pool.submit(commit, MISTAKES[name], folder, recipe)
        yield runs


def assert_one_line(outcome: Outcome, *says: str) -> None:
    assert outcome.code == 2, str(outcome)
    assert len(outcome.stderr.splitlines()) == 1, str(outcome)
    assert outcome.stderr.startswith("error: ")
    assert "Traceback" not in outcome.stdout
    for words in says:
        assert words in outcome.stderr


@pytest.mark.parametrize("name", [name for name in MISTAKES if name not in COMMANDS])
def test_a_mistake_gets_one_line_and_starts_nothing(recipe, tmp_path, monkeypatch, name):
    """Within this process: to start one takes much longer than to find the mistake."""
    monkeypatch.chdir(tmp_path)
    mistake = MISTAKES[name]
    settings = {"run.name": "RUN", "run.storage_path": tmp_path / "runs", **mistake.settings}
    written = prepare(mistake, tmp_path, recipe)
    words = train_words(written, settings, resume=mistake.resume)
    result = CliRunner().invoke(main, words)
    assert_one_line(Outcome(result.exit_code, result.stdout, result.stderr), *mistake.says)
    assert result.stdout == ""
    assert not ray.is_initialized()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_gets_one_line_and_leaves_nothing(mistaken, name):
    run = mistaken[name].result()
    assert_one_line(run.output, *MISTAKES[name].says)
    assert run.output.stdout == ""
    run.wait_until_gone()
    assert not run.path.exists()


def test_a_cluster_that_does_not_answer_is_given_up_soon(mistaken):
    unreachable = mistaken["cluster that doesn't answer"].result()
    quick = mistaken["storage that can't be written"].result()
    assert unreachable.took_s < quick.took_s + UNREACHABLE_DEADLINE_S


@pytest.mark.parametrize("recipe_path", ["missing.toml", "."])
def test_a_recipe_that_can_not_be_read(tmp_path, recipe_path):
    command = Command(tmp_path, *PROGRAM, "train", recipe_path)
    assert_one_line(command.wait(DEADLINE_S), f"recipe {recipe_path}", ".toml")


def files(run: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def used(finished, tmp_path_factory):
    """A copy of the finished run, and all that was in its files."""
    storage = tmp_path_factory.mktemp("used") / "runs"
    shutil.copytree(finished.path, storage / "RUN")
    return storage, files(storage / "RUN")


def test_a_run_name_in_use(train, used):
    storage, before = used
    run = train({"run.storage_path": storage})
    assert_one_line(run.wait(DEADLINE_S), "run.name = RUN is in use", "--resume")
    run.wait_until_gone()
    assert files(storage / "RUN") == before


def test_resuming_with_another_model_leaves_the_run_as_it_was(train, used):
    storage, before = used
    run = train({"run.storage_path": storage, "model.width": 0.1}, resume=True)
    assert_one_line(run.wait(DEADLINE_S), "another model")
    run.wait_until_gone()
    assert files(storage / "RUN") == before


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """Pictures of which 5 in 120 don't decode, single labels."""
    folder = tmp_path_factory.mktemp("damaged")
    examples = list(pictures.single_label(120, seed=2))
    for index in range(0, 120, 24):
        image, labels = examples[index]
        examples[index] = (image[: len(image) // 2], labels)
    pictures.write_shards(folder, "train", examples, num_shards=1)
    pictures.write_shards(folder, "val", list(pictures.single_label(32, seed=3)), num_shards=1)
    return folder


def on(damaged: Path) -> dict[str, object]:
    return {
        "data.train": damaged / "train-*.tar",
        "data.val": damaged / "val-*.tar",
        "training.objective": "softmax",
        "scaling.num_workers": 1,
        "scaling.num_servers": 1,
    }


def test_a_corrupt_image_over_the_limit_ends_the_run(train, damaged):
    run = train({**on(damaged), "data.max_corrupt": 0})
    assert_one_line(run.wait(), "data.max_corrupt = 0", "can't be decoded")
    run.wait_until_gone()
    assert run.result()["status"] == "failed"
    assert "data.max_corrupt" in run.result()["error"]


@pytest.mark.long
def test_corrupt_images_below_the_limit_are_skipped_and_counted(join, damaged):
    run = join({**on(damaged), "data.max_corrupt": 5, "training.samples": 480})
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert result["status"] == "finished"
    assert result["corrupt_images"] == 5
    assert (result["samples"], result["updates"]) == (480, 30)
    assert set(result["eval"]) == set(result["baseline"]) == {"top1", "top5", "loss"}
    counted = sum(point["corrupt"] for point in run.metrics("train"))
    assert counted == 5
