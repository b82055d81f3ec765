"""A file system of some MB that fills up: old checkpoints stay whole, later ones work again."""

import io
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from asynception.report import METRICS_FILE, Reporter
from model.flat import Segment, flat_numel
from ps.checkpoint import (
    ModelLayout,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from ps.client import ModelState
from ps.schedule import Clocks

LAYOUT = ModelLayout((Segment("weight", (64, 1024), 0, True),), (Segment("bn", (64,), 0, False),))
DISK_MB = 4


@pytest.fixture
def disk(tmp_path):
    """A tmpfs with room for some five files of a checkpoint, which has two of 256 KiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def fill(disk: Path, spare_num_bytes: int) -> Path:
    """Leave room for so much."""
    ballast = disk / "ballast"
    room = os.statvfs(disk)
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - spare_num_bytes))
    return ballast


def state_of(updates: int) -> ModelState:
    parameters = torch.full((flat_numel(LAYOUT.parameters),), float(updates))
    statistics = torch.zeros(flat_numel(LAYOUT.statistics))
    vectors = {"parameters": parameters, "ema": parameters}
    vectors |= {"statistics": statistics, "ema_statistics": statistics}
    return ModelState(Clocks(updates, updates), vectors, {})


@pytest.mark.parametrize("spare_num_bytes", [0, 100_000, 400_000])
def test_a_full_disk_costs_one_checkpoint_and_leaves_no_litter(disk, spare_num_bytes):
    folder = disk / "checkpoints"
    for updates in (1, 2):
        write_checkpoint(folder, state_of(updates), LAYOUT, {})
    names = sorted(path.name for path in folder.iterdir())
    ballast = fill(disk, spare_num_bytes)
    with pytest.raises(OSError, match=r"No space left|os error 28"):
        write_checkpoint(folder, state_of(3), LAYOUT, {})
    assert sorted(path.name for path in folder.iterdir()) == names
    for path, updates in zip(list_checkpoints(folder), (1, 2), strict=True):
        state = read_checkpoint(path, LAYOUT, ()).state
        assert torch.equal(state.vectors["parameters"], state_of(updates).vectors["parameters"])
    ballast.unlink()
    path = write_checkpoint(folder, state_of(4), LAYOUT, {})
    prune_checkpoints(folder, 1)
    assert [each.name for each in folder.iterdir()] == [path.name]
    assert read_checkpoint(path, LAYOUT, ()).state.clocks.updates == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_metrics_and_not_the_run(disk):
    shown = Console(file=io.StringIO(), width=200)
    with Reporter(disk, "run", 10, 1.0, terminal=shown) as reporter:
        reporter.event("before")
        ballast = fill(disk, 0)
        for number in range(200):  # what the last block has room for
            reporter.event(f"lost {number}")
            reporter.evaluation(number, number, {"loss": 1.0}, {})
        ballast.unlink()
        reporter.event("after")
    said = shown.file.getvalue()
    assert said.count("metrics.jsonl can't be written, and has a gap from here on") == 1
    lines = (disk / METRICS_FILE).read_text().splitlines()
    texts = []
    for line in lines:
        try:
            texts.append(json.loads(line).get("text"))
        except ValueError:
            texts.append("cut short")
    assert texts[0] == "before"
    assert texts[-1] == "after"
    assert texts.count("cut short") <= 1
    assert len(texts) < 400
