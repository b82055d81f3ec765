"""What servers cost workers that compute: steps/s with servers against a local optimizer.

Two processes, each pinned to a core, train Xception at 128 pixels. With servers, each runs the
worker's own loop, in turn and overlapped, against one server process, which takes its share of the
same cores, or both are one worker (`scaling.processes_per_worker`) that sums up by gloo; without,
each steps torch's fused SGD with momentum and weight decay on its own flat vector, and keeps no
EMA. The ways take turns, a round of each, in the same processes. Prints one line `RESULT {json}`
for each way with servers. A step is one batch of one process.
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
from shard_processes import (
    HOST,
    RULES,
    START,
    TOKEN,
    Served,
    Shards,
    running,
    shards,
    start_process,
)
from torch import nn

from asynception.process_group import Rendezvous, joined_on_node, open_store
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
from worker.node import NodeLeader, follow
from worker.objective import create_objective
from worker.pipeline import PipelineSettings

NUM_CLASSES, SIDE, RULE = 1000, 128, "momentum"
NUM_WORKERS = 2
WHAT = "compute-bound"
LOCAL = Cell(WHAT, "local optimizer")
NODE = Cell("compute-bound, one worker", "in turn")
MODES = {
    Cell(WHAT, "in turn"): PipelineSettings(),
    Cell(WHAT, "overlap"): PipelineSettings(overlap=True),
    NODE: PipelineSettings(),
}
"""The worker's ways to pull, compute and push."""
MEETING_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Reachable:
    """What a worker needs to know of the servers."""

    addresses: Sequence[str]
    layout: Layout
    meeting: str
    """Where both processes of one worker meet, as HOST:PORT."""


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
    worker: int,
    group: Reachable,
    computer: GradientComputer,
    batches: Iterator[Batch],
    pipeline: PipelineSettings,
    node: NodeLeader | None = None,
) -> None:
    client = ParameterClient(group.addresses, group.layout, TOKEN, RetryPolicy(), LaneSettings())
    loop = WorkerLoop(worker, 0, computer, client, pipeline=pipeline, node=node)
    loop.run(batches, lambda report: None)
    client.close()


def _train_together(worker: int, rank: int, group: Reachable, batches: Iterator[Batch]) -> None:
    computer = _computer()
    rendezvous = Rendezvous(group.meeting, NUM_WORKERS, MEETING_TIMEOUT_S, use_gpu=False)
    with joined_on_node(rendezvous, rank, HOST, None) as ranks:
        if rank > 0:
            follow(computer, ranks, batches, batches_per_push=1)
            return
        node = NodeLeader(computer, ranks)
        _train_with_servers(worker, group, computer, batches, MODES[NODE], node)
        node.end()


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
    number: int, way: Cell, core_index: int, batch_size: int, group: Reachable, pipe: Connection
) -> None:
    """number: among all workers, those that take another way included."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core_index]})
    torch.set_num_threads(1)
    tune_malloc()
    batches = _rounds(_batch(batch_size, number), pipe)
    if way == NODE:
        _train_together(number, core_index, group, batches)
    elif way in MODES:
        _train_with_servers(number, group, _computer(), batches, MODES[way])
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
    num_cores = len(os.sched_getaffinity(0))
    if num_cores < NUM_WORKERS:
        yield {"what": WHAT, "skipped": f"{num_cores} core, and each worker takes one"}
        return
    ways = (*MODES, LOCAL)
    store, meeting = open_store(HOST, NUM_WORKERS, MEETING_TIMEOUT_S)
    with shards(1, RULE, LaneSettings(), NUM_WORKERS * len(ways)) as group, ExitStack() as stack:
        _load(group)
        jobs = {}
        for index, way in enumerate(ways):
            processes = [
                start_process(
                    _work,
                    index * NUM_WORKERS + worker,
                    way,
                    worker,
                    batch_size,
                    Reachable(group.addresses, group.layout, meeting),
                )
                for worker in range(NUM_WORKERS)
            ]
            stack.enter_context(running(processes))
            jobs[way] = partial(_run, way, processes, num_steps)
        for job in jobs.values():
            job()
        rounds = measure(jobs, num_rounds)
        layout = group.layout
    del store  # where both processes of one worker met
    push_num_bytes = 4 * (layout.num_parameters + layout.num_statistics)
    for way in jobs:
        ratios = {"x_local": over(way, LOCAL, "steps_per_s")} if way in MODES else {}
        row = row_of(way, rounds, ratios)
        if way in MODES:
            images = batch_size * (NUM_WORKERS if way == NODE else 1)
            row["pushed_mb_per_image"] = round(push_num_bytes / images / 1e6, 2)
        workers = 1 if way == NODE else NUM_WORKERS
        yield {**row, "mode": way.work, "workers": workers, "batch_size": batch_size}


def _run(way: Cell, processes: Sequence[Served], num_steps: int) -> Measured:
    for served in processes:
        served.pipe.send(num_steps)
    if way == NODE:  # in step; rank 1 tells its rate when rank 0 begins the next round
        return {"steps_per_s": NUM_WORKERS * float(processes[0].pipe.recv())}
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
