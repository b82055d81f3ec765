"""What a checkpoint costs the training: updates/s while one is made, against none.

Server processes hold Xception's 22.9 M parameters, worker processes loop pull all, push a full
gradient, as fast as they can, and this process cuts, reads and writes checkpoints, as a run's
driver does. Stretches with a checkpoint and without, each as long as the checkpoint before it,
take turns. Prints `RESULT {json}`: updates/s of both, the median of the rounds' ratios, and what
making a checkpoint took.
"""

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from shard_processes import Shards, shards
from worker_processes import OpenLane, workers

from model.flat import parameter_segments, statistic_segments
from model.registry import create_model
from ps.checkpoint import ModelLayout, prune_checkpoints, write_checkpoint
from ps.lanes.lane import LaneSettings

RULE = "momentum"
CUT_WAIT_S = 10.0


def _rate(group: Shards, stretch: Callable[[], object]) -> tuple[float, float]:
    """Updates/s of the first shard over a stretch, and the seconds that it took."""
    before, begun_s = group.updates()[0], time.monotonic()
    stretch()
    elapsed_s = time.monotonic() - begun_s
    return (group.updates()[0] - before) / elapsed_s, elapsed_s


def _checkpoint(group: Shards, layout: ModelLayout, folder: Path) -> None:
    client = group.control
    client.cut("checkpoint", (), CUT_WAIT_S)
    state = client.read("checkpoint")
    client.release("checkpoint")
    write_checkpoint(folder, state, layout, {})
    prune_checkpoints(folder, 2)


def _tensors() -> ModelLayout:
    with torch.device("meta"):
        module = create_model("xception", 1000)
    return ModelLayout(parameter_segments(module), statistic_segments(module))


@click.command(help=__doc__)
@click.option("--servers", default=2, show_default=True)
@click.option("--num-workers", default=2, show_default=True)
@click.option("--seconds", default=40.0, show_default=True, help="For all rounds together.")
@click.option("--folder", default=None, help="Where to write; a temporary one unless given.")
def main(servers: int, num_workers: int, seconds: float, folder: str | None) -> None:
    torch.set_num_threads(1)
    lanes, rounds, took_s = LaneSettings(), list[tuple[float, float]](), list[float]()
    layout = _tensors()
    with (
        shards(servers, RULE, lanes, num_workers) as group,
        workers(num_workers, group.layout) as crew,
        tempfile.TemporaryDirectory(dir=folder) as written,
    ):
        crew.open("lane", OpenLane(group.addresses, group.layout, lanes))
        training = threading.Thread(target=lambda: crew.run("lane", num_workers, seconds))
        training.start()
        end_s = time.monotonic() + seconds
        stretch_s = 2.0
        while time.monotonic() + 2 * stretch_s < end_s:
            alone, _ = _rate(group, lambda: time.sleep(stretch_s))  # noqa: B023
            beside, stretch_s = _rate(group, lambda: _checkpoint(group, layout, Path(written)))
            rounds.append((beside, alone))
            took_s.append(stretch_s)
        training.join()
    ratios = sorted(beside / alone for beside, alone in rounds)
    row = {
        "servers": servers,
        "workers": num_workers,
        "rounds": len(rounds),
        "alone_updates_per_s": round(statistics.median(alone for _, alone in rounds), 2),
        "beside_updates_per_s": round(statistics.median(beside for beside, _ in rounds), 2),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "checkpoint_s": round(statistics.median(took_s), 2),
    }
    print("RESULT", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
