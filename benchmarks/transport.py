"""Moving and applying bytes, held against the machine's limits and other parameter servers.

Workers loop pull all, push a full gradient, the servers apply it: Xception's 22.9 M parameters.
For each lane a run measures, round by round and each round beginning with another, every number of
workers and of shards, a memcpy and the fused update alone, plain sockets or a bare gRPC stream that
move the same bytes, and the peers. Ratios are of figures of one round; what is reported are medians
with quartiles, since absolute figures swing with the machine's load. Prints one line
`RESULT {json}` for each row, and in the end the bars, met or missed.

momentum: with weight decay and EMA, the real work. sgd: what peers do (the EMA is still kept).
bytes: pushes are dropped after all bytes have moved and were found finite, for GB/s; the time that
the shard itself needs for that is taken off a push.

cycle_ms is time for each update of all workers together, pull_ms and push_ms are one worker's,
shard_ms is the shard's part of a push (the check for NaN and Inf, and the update). CPU seconds are
for each GB pulled or pushed, the servers' own work included. Peaks count shared memory at both
ends; those of all server processes are added, of workers the largest is given.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
import torch
from compute_bound import compute_bound_rows
from measured_rows import Cell, Row, over
from shard_processes import xception_layout
from transport_bars import table, verdicts
from transport_cells import Job, LaneCells, Plan, balance_row, lane_cells
from transport_limits import MemoryLimits
from transport_peers import Runnable, find_peers, run_peer

from asynception.hosts.namespaces import Namespace, lacking, namespace
from ps.lanes.lane import LaneName
from ps.malloc import tune_malloc

ROWS = ("momentum", "sgd", "bytes", "peers", "kernels", "compute")
PEER_WORKERS = (1, 2)
"""With how many workers peers are compared, where ours are measured with as many."""

DEFAULT_PEERS = ("ray_tuned", "torchft", "torchft_system_tcp", "tensorflow")
"""torch RPC was the slowest of those with sockets, by far."""


def _listed(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(filter(None, value.split(",")))


def _counts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    return tuple(int(each) for each in value.split(","))


def _names(all_names: tuple[str, ...]) -> str:
    return ",".join(all_names)


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=0.6, show_default=True, help="Of looping, for each figure.")
@click.option("--workers", default="1,2,4", show_default=True, callback=_counts)
@click.option("--shards", default="1,4", show_default=True, callback=_counts)
@click.option("--lanes", default="shm,tcp,grpc", show_default=True, callback=_listed)
@click.option("--rows", default=_names(ROWS), show_default=True, callback=_listed)
@click.option("--peers", default=_names(DEFAULT_PEERS), show_default=True, callback=_listed)
@click.option("--peer-seconds", default=1.5, show_default=True, help="Of a peer's looping.")
@click.option(
    "--peers-dir",
    envvar="PEERS_DIR",
    default="../shared/bench",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Peers' scripts; also PEERS_DIR.",
)
@click.option(
    "--bench-home",
    envvar="BENCH_HOME",
    default="~/.cache/asynception-peers",
    show_default=True,
    help="Peers' environments; also BENCH_HOME.",
)
@click.option("--compute-steps", default=6, show_default=True, help="A round's, by each worker.")
def main(
    rounds: int,
    seconds: float,
    workers: tuple[int, ...],
    shards: tuple[int, ...],
    lanes: tuple[LaneName, ...],
    rows: tuple[str, ...],
    peers: tuple[str, ...],
    peer_seconds: float,
    peers_dir: Path,
    bench_home: str,
    compute_steps: int,
) -> None:
    torch.set_num_threads(1)
    tune_malloc()
    results: list[Row] = []
    plan = Plan(workers, shards, rows, seconds, rounds)
    home = Path(bench_home).expanduser()
    wanted = peers if "peers" in rows and "sgd" in rows else ()
    found, skipped = find_peers(wanted, peers_dir.absolute(), home.absolute())
    for name, reason in skipped.items():
        _report(results, {"what": name, "skipped": reason})
    limits = MemoryLimits(xception_layout(1))
    with ExitStack() as stack:
        within = stack.enter_context(namespace("asynception-peers")) if _namespaces(found) else None
        for lane in lanes:
            for row in _lane_rows(lane, plan, limits, found, peer_seconds, within):
                _report(results, row)
    del limits
    if "kernels" in rows:
        for row in _kernel_rows():
            _report(results, row)
    if "compute" in rows:
        for row in compute_bound_rows(rounds, compute_steps):
            _report(results, row)
    print("\n" + "\n".join(table(verdicts(results))))


def _report(results: list[Row], row: Row) -> None:
    results.append(row)
    print("RESULT", json.dumps(row), flush=True)


def _namespaces(found: list[Runnable]) -> bool:
    """Whether peers that use sockets get reno, as our own lane does; else the system's choice."""
    if not any(runnable.peer.uses_sockets for runnable in found):
        return False
    reason = lacking()
    if reason:
        print(f"peers keep the system's congestion control: {reason}", file=sys.stderr)
    return reason is None


def _lane_rows(
    lane: LaneName,
    plan: Plan,
    limits: MemoryLimits,
    found: list[Runnable],
    peer_seconds: float,
    within: Namespace | None,
) -> Iterator[Row]:
    with lane_cells(lane, plan, limits) as cells:
        fitting = [each for each in found if each.peer.uses_sockets == (lane == "tcp")]
        jobs = _peer_jobs(cells, fitting if lane != "grpc" else [], peer_seconds, within)
        yield from cells.rounds(jobs)
        for num_shards, group in cells.groups.items():
            if num_shards > 1:
                yield balance_row(lane, group, max(plan.workers))


def _peer_jobs(
    cells: LaneCells, found: list[Runnable], seconds: float, within: Namespace | None
) -> Mapping[Cell, Job]:
    jobs: dict[Cell, Job] = {}
    num_parameters = xception_layout(1).num_parameters
    for runnable in found:
        name = runnable.peer.name
        for num_workers in sorted({*cells.plan.workers} & {*PEER_WORKERS}):
            cell, ours = Cell(name, "sgd", num_workers), Cell(cells.lane, "sgd", num_workers)
            ours_tcp = runnable.peer.uses_sockets and not runnable.peer.keeps_system_tcp
            where = within if ours_tcp else None
            jobs[cell] = partial(run_peer, runnable, num_workers, num_parameters, seconds, where)
            cells.ratios[ours][f"x {name}"] = over(ours, cell, "updates_per_s")
    return jobs


def _kernel_rows() -> Iterator[Row]:
    """The fused kernels beside C, by the benchmark of updates."""
    script = Path(__file__).with_name("update.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--rounds", "9"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    for line in done.stdout.splitlines():
        row = json.loads(line.removeprefix("RESULT ")) if line.startswith("RESULT ") else {}
        if row.get("variant") == "fused" and "x C -O3" in row:
            yield {**row, "what": "kernel", "rule": row["what"]}


if __name__ == "__main__":
    main()
