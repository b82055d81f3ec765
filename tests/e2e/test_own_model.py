"""A module of the user's own through a whole run, and a run that starts from another's weights."""

import json
from pathlib import Path

import pytest
from processes import PROGRAM, Command
from safetensors.torch import load_file

from asynception.recipe import FACTORY_FILE

SOURCE = """
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, hidden):
        super().__init__()
        self.conv = nn.Conv2d(3, hidden, 5, stride=4)
        self.bn = nn.BatchNorm2d(hidden)
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, images):
        return self.fc(F.relu(self.bn(self.conv(images))).mean((2, 3)))

def build(num_classes, hidden=8):
    return Net(num_classes, hidden)
"""
SAMPLES = 3840
DEADLINE_S = 120.0


def command(folder: Path, *arguments: object) -> str:
    outcome = Command(folder, *PROGRAM, *map(str, arguments)).wait(DEADLINE_S)
    assert outcome.code == 0, str(outcome)
    return outcome.stdout


@pytest.fixture(scope="module")
def own(join_module, tmp_path_factory):
    """A finished run of a model whose file was gone before the workers had begun."""
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(SOURCE)
    settings = {
        "run.name": "own",
        "model.factory": f"{path}:build",
        "model.hidden": 24,
        "training.samples": SAMPLES,
    }
    run = join_module(settings)
    run.wait_for_folder()
    path.unlink()
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    return run


def test_a_model_of_ones_own_learns_without_its_file(own):
    result = own.result()
    assert (result["status"], result["samples"]) == ("finished", SAMPLES)
    assert result["eval"]["loss"] < result["baseline"]["loss"]


@pytest.fixture(scope="module")
def weights(own, tmp_path_factory) -> Path:
    """The run's EMA as a file."""
    out = tmp_path_factory.mktemp("weights") / "own.safetensors"
    command(out.parent, "export", own.path, "--out", out, "--ema")
    return out


def test_what_was_run_is_kept_evaluated_and_exported(own, weights, tmp_path):
    assert (own.path / FACTORY_FILE).read_text() == SOURCE
    evaluated = json.loads(command(tmp_path, "evaluate", own.path))["eval"]
    assert evaluated == pytest.approx(own.result()["eval"], rel=1e-4)
    assert load_file(weights)["conv.weight"].shape == (24, 3, 5, 5)


@pytest.mark.long
def test_a_run_starts_from_exported_weights(own, weights, join):
    settings = {
        "model.factory": f"{own.path / FACTORY_FILE}:build",
        "model.hidden": 24,
        "model.weights": weights,
        "training.samples": 16,
        "schedule.lr": 1e-9,
        "ema.decay": 0.999999,
        "ema.warmup": False,
    }
    run = join(settings)
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    assert run.result()["eval"]["map@100"] == pytest.approx(own.result()["eval"]["map@100"])
