"""A server of two is killed: what it had not passed on is lost and counted, and nothing else.

The model's gradient is -1 in every element, and the learning rate 1, so that each parameter is the
number of updates that it has had.
"""

import re

import pytest
from conftest import BATCH_SIZE
from processes import events, wait_for_event
from safetensors.torch import load_file

from ps.checkpoint import read_metadata

SOURCE = """
import torch
from torch import nn

class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, num_classes):
        ctx.shape = weight.shape
        return images.new_zeros(len(images), num_classes)

    @staticmethod
    def backward(ctx, gradient):
        return None, torch.full(ctx.shape, -1.0), None

class Counter(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.zeros(2, 4096))

    def forward(self, images):
        return Counted.apply(images, self.weight, self.num_classes)

def build(num_classes):
    return Counter(num_classes)
"""
SAMPLES = 2000 * BATCH_SIZE


@pytest.fixture(scope="module")
def salvaged(join_module, tmp_path_factory):
    """A run without a checkpoint that lost one of its servers, and went on to its end."""
    path = tmp_path_factory.mktemp("counter") / "counter.py"
    path.write_text(SOURCE)
    run = join_module(
        {
            "model.factory": f"{path}:build",
            "training.samples": SAMPLES,
            "training.clip_norm": "none",
            "optimizer.name": "sgd",
            "schedule.final": 1.0,
            "schedule.lr": 1.0,
            "evaluation.every_epochs": 1000,
            "checkpoint.every_epochs": "none",
            "checkpoint.every_s": "none",
        }
    )
    run.wait_for_samples(SAMPLES // 8)
    run.titled("ray::ServerProcess")[0].kill()
    wait_for_event(run, "starting again from")
    outcome = run.wait()
    assert outcome.code == 0, outcome
    return run


def test_only_updates_of_the_lost_shard_are_lost_and_all_are_counted(salvaged):
    result = salvaged.result()
    (event,) = (event for event in events(salvaged) if "starting again from" in event)
    found = re.search(r"starting again from (\d+) samples: server (\d) lost (\d+) updates,", event)
    assert found, event
    kept, shard, lost = map(int, found.groups())
    assert "the others none" in event
    assert result["updates_lost"] == ({str(shard): lost} if lost else {})
    assert (result["status"], result["samples"], result["restarts"]) == ("finished", SAMPLES, 1)
    assert kept >= SAMPLES // 8
    last = salvaged.path / "checkpoints" / salvaged.checkpoints()[-1]
    metadata = read_metadata(last)
    clocks = {metadata["updates"], metadata["updates"] + metadata["version_skew"]}
    halves = load_file(last / "model.safetensors")["weight"]
    counts = [half.unique().tolist() for half in halves]
    counts[shard] = [count + lost for count in counts[shard]]
    assert all(len(each) == 1 for each in counts), "each shard's elements have had the same"
    assert {count for (count,) in counts} == clocks
    assert result["receipts"] == {"applied": sum(count for (count,) in counts)}
    # Every batch's push is in every shard, or counted as lost there; a few of them twice.
    num_pushes = SAMPLES // BATCH_SIZE
    assert num_pushes <= min(clocks) <= max(clocks) <= num_pushes + 2
