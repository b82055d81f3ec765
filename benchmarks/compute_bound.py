"""What servers cost workers that compute: steps/s with servers against a local optimizer.

Two processes, each pinned to a core, train Xception at 128 pixels. With servers, each runs the
worker's own loop, in turn and overlapped, against one server process, which takes its share of the
same cores; without, each steps torch's fused SGD with momentum and weight decay on its own flat
vector, and keeps no EMA. The ways take turns, a round of each, in the same processes. Prints one
line `RESULT {json}` for each way with servers.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import click
import torch
from measured_rows import Cell, Measured, Row, measure, over, row_of
from shard_processes import RULES, START, TOKEN, Served, Shards, running, shards, start_process
from torch import nn

from model.flat import FlatModule
from model.registry import create_model
from ps.client import ModelState, ParameterClient, RetryPolicy
from ps.lanes.lane import LaneSettings
from ps.layout import Layout
from ps.malloc import tune_malloc
from ps.state import initial_state
from worker.data.labels import LabelLists
from worker.data.loader import Batch
from worker.gradient import GradientComputer
from worker.loop import WorkerLoop
from worker.objective import create_objective
from worker.pipeline import PipelineSettings

NUM_CLASSES, SIDE, RULE = 1000, 128, "momentum"
NUM_WORKERS = 2
WHAT = "compute-bound"
LOCAL = Cell(WHAT, "local optimizer")
MODES = {
    Cell(WHAT, "in turn"): PipelineSettings(),
    Cell(WHAT, "overlap"): PipelineSettings(overlap=True),
}
"""The worker's ways to pull, compute and push."""


@dataclass(frozen=True)
class Reachable:
    """What a worker needs to know of the servers."""

    addresses: Sequence[str]
    layout: Layout


def _batch(num_images: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, 3, SIDE, SIDE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = LabelLists.from_lists([(seed + i) % NUM_CLASSES] for i in range(num_images))
    return Batch(images, labels, 0, num_images, ())


def _computer() -> GradientComputer:
    torch.manual_seed(0)
    flat = FlatModule(create_model("xception", NUM_CLASSES))
    return GradientComputer(flat, create_objective("softmax", NUM_CLASSES), clip_norm=None)


def _rounds(batch: Batch, pipe: Connection) -> Iterator[Batch]:
    """Batches by the round, as the parent asks for them; tells it each round's steps/s.

    A first step, which is not counted, leaves an overlapped loop as the last one does: with a push
    under way.
    """
    with contextlib.suppress(EOFError):
        while True:
            num_steps = pipe.recv()
            yield batch
            start_s = time.perf_counter()
            for _ in range(num_steps):
                yield batch
            pipe.send(num_steps / (time.perf_counter() - start_s))


def _train_with_servers(
    worker: int, group: Reachable, pipeline: PipelineSettings, batches: Iterator[Batch]
) -> None:
    client = ParameterClient(group.addresses, group.layout, TOKEN, RetryPolicy(), LaneSettings())
    loop = WorkerLoop(worker, 0, _computer(), client, pipeline=pipeline)
    loop.run(batches, lambda report: None)
    client.close()


def _train_locally(batches: Iterator[Batch]) -> None:
    computer = _computer()
    flat = computer.flat
    parameters = nn.Parameter(flat.parameters)
    parameters.grad = flat.gradients
    rule = RULES[RULE]
    optimizer = torch.optim.SGD(
        [parameters], lr=1e-6, momentum=0.9, weight_decay=rule.weight_decay, fused=True
    )
    for batch in batches:
        computer.compute(batch)
        optimizer.step()


def _work(
    number: int, way: Cell, core: int, batch_size: int, group: Reachable, pipe: Connection
) -> None:
    """number: among all workers, those that take another way included."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    tune_malloc()
    batches = _rounds(_batch(batch_size, number), pipe)
    if way in MODES:
        _train_with_servers(number, group, MODES[way], batches)
    else:
        _train_locally(batches)


def _load(group: Shards) -> None:
    """What the workers' module begins with: zeros would make all gradients vanish."""
    flat = _computer().flat
    state = initial_state(RULES[RULE], flat.parameters, flat.statistics)
    group.control.load(ModelState(START, state.vectors, {}))


def compute_bound_rows(num_rounds: int, num_steps: int, batch_size: int = 8) -> Iterator[Row]:
    """Steps/s of both workers together, and their ratio to the local optimizer's.

    num_steps: of each worker in each round.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < NUM_WORKERS:
        yield {"what": WHAT, "skipped": f"{len(cores)} core, and each worker takes one"}
        return
    ways = (*MODES, LOCAL)
    with shards(1, RULE, LaneSettings(), NUM_WORKERS * len(ways)) as group, ExitStack() as stack:
        _load(group)
        jobs = {}
        for index, way in enumerate(ways):
            processes = [
                start_process(
                    _work,
                    index * NUM_WORKERS + worker,
                    way,
                    cores[worker],
                    batch_size,
                    Reachable(group.addresses, group.layout),
                )
                for worker in range(NUM_WORKERS)
            ]
            stack.enter_context(running(processes))
            jobs[way] = partial(_run, processes, num_steps)
        for job in jobs.values():
            job()
        rounds = measure(jobs, num_rounds)
    for way in jobs:
        ratios = {"x_local": over(way, LOCAL, "steps_per_s")} if way in MODES else {}
        row = row_of(way, rounds, ratios)
        yield {**row, "mode": way.work, "workers": NUM_WORKERS, "batch_size": batch_size}


def _run(processes: Sequence[Served], num_steps: int) -> Measured:
    for served in processes:
        served.pipe.send(num_steps)
    return {"steps_per_s": sum(float(served.pipe.recv()) for served in processes)}


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=6, show_default=True, help="A round's, by each worker.")
@click.option("--batch-size", default=8, show_default=True)
def main(rounds: int, steps: int, batch_size: int) -> None:
    for row in compute_bound_rows(rounds, steps, batch_size):
        print("RESULT", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
