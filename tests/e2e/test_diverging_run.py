"""A learning rate that grows too large: the run goes back to before, with a lower one, and ends."""

import re

import pytest
from conftest import SAMPLES
from processes import checkpoints, events

from ps.checkpoint import read_metadata

pytestmark = pytest.mark.long

SOURCE = """
import time
from torch import nn

class Slow(nn.Sequential):
    def forward(self, images):
        time.sleep(0.02)  # several windows, and checkpoints, before the loss rises
        return super().forward(images)

def build(num_classes):
    return Slow(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
"""


@pytest.fixture(scope="module")
def diverging(join_module, tmp_path_factory):
    """Weights decay to w * (1 - lr), which grows without bound once the rate is above 2: after half
    of the warmup, so that by then there are checkpoints, however busy the machine is."""
    path = tmp_path_factory.mktemp("linear") / "linear.py"
    path.write_text(SOURCE)
    run = join_module(
        {
            "model.factory": f"{path}:build",
            "training.clip_norm": "none",
            "training.on_divergence": "rollback",
            "training.rollback_lr_factor": 0.01,
            "optimizer.name": "sgd",
            "optimizer.weight_decay": 1,
            "schedule.lr": 4,
            "schedule.warmup": 24,
            "checkpoint.num_to_keep": 1,
        }
    )
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    return run


def test_the_run_goes_back_to_a_good_checkpoint_and_reaches_its_end(diverging):
    result = diverging.result()
    assert (result["status"], result["samples"], result["rollbacks"]) == ("finished", SAMPLES, 1)
    assert result["restarts"] == 0
    assert result["eval"]["loss"] < 2 * result["baseline"]["loss"]
    (event,) = (event for event in events(diverging) if event.startswith("diverged: "))
    found = re.search(r"good checkpoint is (\S+)\); starting again from (\d+) samples", event)
    assert found, event
    assert event.endswith("with the learning rate times 0.01")
    good, samples = found[1], int(found[2])
    assert 0 < samples < SAMPLES
    # What was written after it is there for those who look, and for no one else.
    aside = sorted(path.name for path in diverging.path.glob("checkpoints/diverged-*"))
    assert all(name.removeprefix("diverged-") > good.removeprefix("checkpoint-") for name in aside)
    assert read_metadata(diverging.path / "checkpoints" / checkpoints(diverging.path)[-1])
