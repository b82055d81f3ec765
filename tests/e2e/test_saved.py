"""What can be done with a finished run, and what can be known before one."""

import io
import json
import resource
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import VAL_IMAGES
from pictures import NUM_CLASSES
from PIL import Image
from processes import PROGRAM, Command
from safetensors.torch import load_file
from torch.nn import functional as F

from asynception.cli import main
from asynception.plan import plan_model
from asynception.recipe import known_keys, load_config
from model.registry import create_model
from ps.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint

DEADLINE_S = 120.0


@pytest.fixture
def asynception(tmp_path, monkeypatch):
    """Runs a command to its successful end: in this process, since most do less than starts one."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    return run


@pytest.fixture(scope="module")
def held_out(folder):
    """The held-out images, float (N, 3, H, W) in -1..1, and their labels as 0 and 1."""
    images, targets = [], torch.zeros(VAL_IMAGES, NUM_CLASSES)
    with tarfile.open(folder / "pictures" / "val-00000.tar") as tar:
        for member in tar:
            content = tar.extractfile(member).read()
            if member.name.endswith(".png"):
                pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
                images.append(torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1)
            else:
                targets[len(images) - 1, json.loads(content)["labels"]] = 1
    return torch.stack(images), targets


def measure(state: dict[str, torch.Tensor], images, targets) -> dict[str, float]:
    """The run's metrics of a state dict, worked out anew."""
    model = create_model("xception", NUM_CLASSES, width=0.05, middle_blocks=1)
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        logits = model.eval()(images)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(images)
    scores = []
    for row, wanted in zip(logits, targets, strict=True):
        hits = wanted[row.argsort(descending=True)]
        precision = hits.cumsum(0) / torch.arange(1, NUM_CLASSES + 1)
        scores.append(float((precision * hits).sum() / hits.sum()))
    return {"loss": loss.item(), "map@100": sum(scores) / len(scores)}


def test_evaluate_finds_what_the_run_found_at_its_end(finished, tmp_path):
    outcome = Command(tmp_path, *PROGRAM, "evaluate", str(finished.path)).wait(DEADLINE_S)
    assert outcome.code == 0, str(outcome)
    printed = json.loads(outcome.stdout)
    result = finished.result()
    assert printed["checkpoint"] == result["checkpoint"]
    assert printed["ema"] is True
    assert printed["eval"] == pytest.approx(result["eval"], rel=1e-4)


def test_a_moved_run_can_be_evaluated(asynception, finished, tmp_path):
    moved = shutil.copytree(finished.path, tmp_path / "moved")
    printed = json.loads(asynception("evaluate", moved).stdout)
    assert printed["checkpoint"].startswith(str(moved))
    assert printed["eval"] == pytest.approx(finished.result()["eval"], rel=1e-4)


@pytest.mark.parametrize("ema", [True, False], ids=["ema", "raw"])
def test_what_is_exported_is_what_is_evaluated(asynception, finished, held_out, tmp_path, ema):
    out = tmp_path / "model.safetensors"
    asynception("export", finished.path, "--out", out, *(["--ema"] if ema else []))
    measured = measure(load_file(out), *held_out)
    printed = json.loads(asynception("evaluate", finished.path, *([] if ema else ["--raw"])).stdout)
    assert printed["ema"] is ema
    assert measured == pytest.approx(printed["eval"], rel=1e-4)
    if ema:
        assert measured == pytest.approx(finished.result()["eval"], rel=1e-4)
    else:
        assert measured["loss"] != pytest.approx(finished.result()["eval"]["loss"], rel=1e-4)


def test_an_exported_program_is_what_is_evaluated(asynception, finished, held_out, tmp_path):
    out = tmp_path / "model.pt2"
    asynception("export", finished.path, "--out", out, "--format", "torch-export", "--ema")
    images, targets = held_out
    with torch.inference_mode():
        logits = torch.export.load(out).module()(images)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(images)
    assert loss.item() == pytest.approx(finished.result()["eval"]["loss"], rel=1e-4)


def test_an_earlier_checkpoint_can_be_named(asynception, finished):
    first = finished.checkpoints()[0]
    printed = json.loads(asynception("evaluate", finished.path, "--checkpoint", first).stdout)
    assert printed["checkpoint"].endswith(first)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate", "."], "holds no checkpoint"),
        (["evaluate", "RUN", "--checkpoint", "best"], "'best'"),
        (["export", "RUN", "--out", "nowhere/model.safetensors"], "--out nowhere"),
    ],
)
def test_a_mistake_gets_one_line(finished, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    words = [str(finished.path) if word == "RUN" else word for word in arguments]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert says in result.stderr


def test_a_checkpoint_that_finds_no_room_fails_as_files_do(finished, tmp_path):
    config = load_config(finished.path)
    layout = plan_model(config, NUM_CLASSES).tensors
    last = Path(finished.result()["checkpoint"])
    saved = read_checkpoint(last, layout, tuple(config.optimizer.slots))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    # In a process of its own: the limit would hold for this one's log as well.
    with (
        ProcessPoolExecutor(
            1,
            get_context("spawn"),
            initializer=resource.setrlimit,
            initargs=(resource.RLIMIT_FSIZE, (4096, most)),
        ) as small_disk,
        pytest.raises(OSError, match="File too large"),
    ):
        small_disk.submit(write_checkpoint, tmp_path, saved.state, layout, saved.extra).result()
    assert not list_checkpoints(tmp_path)


def test_info_says_what_a_run_will_take(asynception, recipe):
    text = asynception("info", recipe, "--scaling.num_servers", "3").stdout
    model = create_model("xception", NUM_CLASSES, width=0.05, middle_blocks=1)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{num_parameters:,}" in text
    assert "shard 2" in text
    assert "shard 3" not in text
    assert "MB" in text


def test_help_lists_every_setting(asynception):
    words = set(asynception("train", "--help").stdout.split())
    assert {f"--{key}" for key in known_keys()} <= words
    commands = asynception("--help").stdout
    assert all(name in commands for name in ("train", "evaluate", "export", "import-keras", "info"))
