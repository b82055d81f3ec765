"""A server of two is killed: what it had not passed on is lost and counted, and nothing else."""

import re

import pytest
from conftest import BATCH_SIZE
from counter_model import counting
from processes import events, wait_for_event
from safetensors.torch import load_file

from ps.checkpoint import read_metadata

SAMPLES = 2000 * BATCH_SIZE


@pytest.fixture(scope="module")
def salvaged(join_module, tmp_path_factory):
    """A run without a checkpoint that lost one of its servers, and went on to its end."""
    settings = counting(tmp_path_factory.mktemp("counter")) | {"training.samples": SAMPLES}
    run = join_module(settings)
    run.wait_for_samples(SAMPLES // 8)
    run.titled("ray::ServerProcess")[0].kill()
    wait_for_event(run, "starting again from")
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
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
    # Every batch's push is in every shard, or counted as lost there; a few of them twice, which is
    # told and counted. A lost update may hide one of these here.
    num_pushes, twice = SAMPLES // BATCH_SIZE, result["data"]["samples_twice"]
    assert num_pushes == min(clocks)
    assert (max(clocks) - num_pushes) * BATCH_SIZE <= twice <= 2 * BATCH_SIZE
    assert (f"; {twice} samples are trained on twice somewhere" in event) == (twice > 0)
