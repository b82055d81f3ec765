"""The price of TLS: pulls and pushes of 22.9 M parameters in each lane, with and without it.

One server process each way and one caller on loopback; rounds take turns. Prints one line
`RESULT {json}` for each way: GB/s of pulls and of pushes (with their update), updates/s of a loop
of both, processor seconds for a GB at both ends, and with TLS the ratios to the same lane without
it in the same round. Between nodes tcp in TLS is there in gRPC's place, so it has the ratios to
gRPC in TLS as well. The last line is what the tcp lane could have at most: Python's ssl moving as
many bytes one way, and nothing else.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection

import click
import torch
from measured_rows import Cell, Measured, Ratio, measure, over, row_of
from shard_processes import (
    HOST,
    TOKEN,
    cpu_s_of,
    load_zeros,
    running,
    serve,
    shard_config,
    start_process,
    vectors_num_bytes,
    wait_for_end,
    xception_layout,
)
from tls_sockets import tls_sockets

from ps.authority import new_identities
from ps.client import ParameterClient, RetryPolicy
from ps.lanes.lane import LaneName, LaneSettings
from ps.lanes.segment import shared_zeros
from ps.malloc import tune_malloc
from ps.tls import Identity

Job = Callable[[], Measured]

RULE = "momentum"
FIGURES = ("pull_gb_per_s", "push_gb_per_s", "updates_per_s", "cpu_s_per_gb")
PLAIN = {lane: Cell(lane, "plain") for lane in ("shm", "tcp", "grpc")}
ENCRYPTED = {lane: Cell(lane, "tls") for lane in ("shm", "tcp", "grpc")}
SOCKETS = Cell("sockets", "tls")


def _serve(lane: LaneName, identity: Identity | None, pipe: Connection) -> None:
    lanes = LaneSettings(choice=lane)
    server = serve(shard_config(xception_layout(1), 0, RULE), HOST, 1, lanes, identity)
    pipe.send(server.address)
    wait_for_end(pipe)
    server.stop()


def _exchange(client: ParameterClient, server_pid: int) -> Callable[[], Measured]:
    """Makes one update, whose gradient lies where the lane reads it."""
    layout = client.layout
    vectors = [shared_zeros(numel) for numel in (layout.num_parameters, layout.num_statistics) * 2]
    parameters, statistics, gradient, delta = vectors
    giga = vectors_num_bytes(layout) / 1e9
    sequences = iter(range(10**9))

    def cpu_s() -> float:
        return time.process_time() + cpu_s_of(server_pid)

    def exchange() -> Measured:
        start_cpu_s, start_s = cpu_s(), time.perf_counter()
        versions = client.pull(parameters, statistics)
        pulled_s = time.perf_counter()
        client.push(0, 0, next(sequences), versions, 32, gradient, delta)
        pushed_s = time.perf_counter()
        return {
            "pull_gb_per_s": giga / (pulled_s - start_s),
            "push_gb_per_s": giga / (pushed_s - pulled_s),
            "updates_per_s": 1 / (pushed_s - start_s),
            "cpu_s_per_gb": (cpu_s() - start_cpu_s) / (2 * giga),
        }

    return exchange


def _way(stack: ExitStack, cell: Cell, server: Identity | None, caller: Identity | None) -> Job:
    """One server process, and what makes an update at it."""
    served = start_process(_serve, cell.what, server)
    stack.enter_context(running([served]))
    client = ParameterClient(
        [served.pipe.recv()],
        xception_layout(1),
        TOKEN,
        RetryPolicy(),
        LaneSettings(choice=cell.what),
        identity=caller,
    )
    stack.callback(client.close)
    load_zeros(client, RULE)
    return _exchange(client, served.pid)


def _jobs(stack: ExitStack) -> dict[Cell, Job]:
    own = new_identities()
    num_bytes = vectors_num_bytes(xception_layout(1))
    jobs = {cell: _way(stack, cell, None, None) for cell in PLAIN.values()}
    jobs |= {cell: _way(stack, cell, own.server, own.caller) for cell in ENCRYPTED.values()}
    return jobs | {SOCKETS: stack.enter_context(tls_sockets(own, num_bytes))}


def _ratios(cell: Cell) -> dict[str, Ratio]:
    """Over the same lane without TLS; tcp also over gRPC, in whose place it comes."""
    if cell == SOCKETS:
        return {"x_tcp_tls_pull": over(cell, ENCRYPTED["tcp"], "pull_gb_per_s")}
    others = {"plain": PLAIN[cell.what]} if cell.work == "tls" else {}
    if cell == ENCRYPTED["tcp"]:
        others |= {"grpc_tls": ENCRYPTED["grpc"], "grpc_plain": PLAIN["grpc"]}
    return {
        f"x_{name}_{figure.partition('_')[0]}": over(cell, other, figure)
        for name, other in others.items()
        for figure in FIGURES
    }


@click.command(help=__doc__)
@click.option("--rounds", default=15, show_default=True)
def main(rounds: int) -> None:
    torch.set_num_threads(1)
    tune_malloc()
    with ExitStack() as stack:
        jobs = _jobs(stack)
        for job in jobs.values():
            job()
        measured = measure(jobs, rounds)
    for cell in jobs:
        print("RESULT", json.dumps(row_of(cell, measured, _ratios(cell))), flush=True)


if __name__ == "__main__":
    main()
