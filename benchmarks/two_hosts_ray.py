"""The trainer itself between two hosts: a raylet on each, the server on one, the worker on the
other. The model is `wide.py`'s, so that a step is a pull and a push."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from measured_rows import Row, with_spread

from asynception.hosts.ray_nodes import NodeOptions, RayNodes

NODES = (
    NodeOptions(num_cpus=1, resources={"server": 1}),
    NodeOptions(num_cpus=1, resources={"worker": 1}),
)
NUM_PARAMETERS = 22_855_952
"""Xception's."""
RUN_TIMEOUT_S = 300.0
HERE = Path(__file__).parent


def train_rows(
    nodes: RayNodes, folder: Path, gbit: float, seconds: float, rounds: int
) -> Iterator[Row]:
    """Rows of one rate, to which the hosts' links have been limited; a run for each wire type.

    seconds: of training for each; its points, one a second or so, stand for rounds.
    """
    for wire in ("float32", "bfloat16"):
        name = f"{gbit:g}-{wire}"
        settings = {
            "run.name": name,
            "wire.pull": wire,
            "wire.push": wire,
            "training.max_s": seconds * (rounds + 1),
            "run.log_every_s": seconds,
        }
        _train(nodes, folder, settings)
        yield _row(folder / name, wire, gbit)


def _train(nodes: RayNodes, folder: Path, settings: Mapping[str, Any]) -> None:
    everything = {**_settings(nodes, folder), **settings}
    recipe = folder / "recipe.toml"
    recipe.write_text("")
    command = [sys.executable, "-m", "asynception", "train", str(recipe)]
    command += [f"--{key}={value}" for key, value in everything.items()]
    done = subprocess.run(
        nodes.command(0, command),
        env=nodes.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"the run ended with {done.returncode}: {done.stderr[-2000:]}")


def _settings(nodes: RayNodes, folder: Path) -> dict[str, Any]:
    return {
        "run.storage_path": folder,
        "ray.address": nodes.address,
        "model.factory": f"{HERE / 'wide.py'}:build",
        "model.num_parameters": NUM_PARAMETERS,
        "data.train": f"{HERE / 'tally.py'}:images",
        "data.val": f"{HERE / 'tally.py'}:images",
        "data.image_size": 8,
        "data.batch_size": 1,
        "training.objective": "softmax",
        "training.samples": 1_000_000,
        "optimizer.name": "momentum",
        "evaluation.every_epochs": 10_000,
        "checkpoint.every_s": "none",
        "scaling.num_workers": 1,
        "scaling.num_servers": 1,
        "scaling.resources_per_server": '{"server" = 1}',
        "scaling.resources_per_worker": '{"CPU" = 1, "worker" = 1}',
    }


def _row(run: Path, wire: str, gbit: float) -> Row:
    """Of the run's points but the first, in which memory is touched for the first time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = [line for line in lines if line["kind"] == "train" and line["pull_s"]][1:]
    lanes = sorted({lane for point in points for lane in point["lanes"]})
    travels = 0.5 if wire == "bfloat16" else 1.0
    row: Row = {"what": f"trainer, {'+'.join(lanes)}", "wire": wire, "link_gbit": gbit, "hosts": 2}
    row |= {"workers": 1, "shards": 1, "rounds": len(points)}
    row |= with_spread("updates_per_s", [point["samples_per_s"] for point in points])
    for way in ("pull", "push"):
        gbps = [4 * NUM_PARAMETERS / point[f"{way}_s"] / 1e9 for point in points]
        row |= with_spread(f"{way}_gbps", gbps)
        row |= with_spread(f"x_link_{way}", _of_link(gbps, travels, gbit))
    return row


def _of_link(gbps: Sequence[float], travels: float, gbit: float) -> list[float]:
    return [each * travels * 8 / gbit for each in gbps]
