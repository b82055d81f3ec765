"""The price of replicas: updates/s of one shard with 22.9 M parameters, with and without a standby.

Server, standby and workers are processes on loopback, and workers pull and push as fast as they
can; the standby follows by tcp, or by gRPC where that is the workers' lane. Rounds take turns.
Prints one line `RESULT {json}` for each lane and kind of server: one that can have no standby
("fixed"), one that has none, one that has one; updates/s, and of each but the first the ratio to
the one before in the same round.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection

import click
import torch
from measured_rows import Cell, Measured, Row, measure, over, row_of
from shard_processes import (
    HOST,
    RULES,
    TOKEN,
    Shards,
    load_zeros,
    running,
    shard_config,
    shards,
    start_process,
    wait_for_end,
    xception_layout,
)
from worker_processes import OpenLane, Workers, workers

from ps.client import RetryPolicy
from ps.lanes.lane import LaneName, LaneSettings
from ps.malloc import tune_malloc
from ps.replicated import ReplicatedService
from ps.replication import ReplicationClient, StandbyLink, add_replication
from ps.rules import warm_up
from ps.server import ShardServer

RULE = "momentum"
LANES: tuple[LaneName, ...] = ("shm", "tcp", "grpc")


def _serve(num_workers: int, lanes: LaneSettings, pipe: Connection) -> None:
    """A server that has a standby, or is one."""
    torch.set_num_threads(1)
    tune_malloc()
    warm_up(RULES[RULE], (torch.float32,))
    service = ReplicatedService(shard_config(xception_layout(1), 0, RULE))

    def connect(address: str) -> StandbyLink:
        return StandbyLink(address, TOKEN, RetryPolicy(), lanes)

    server = ShardServer(
        service,
        HOST,
        TOKEN,
        num_workers,
        lanes,
        more=lambda server: add_replication(server, service, connect),
    )
    server.start()
    pipe.send(server.address)
    wait_for_end(pipe)
    server.stop()


@contextmanager
def _alone(num_workers: int, lane: LaneName) -> Iterator[Shards]:
    """A server that has no standby, and may be given one."""
    lanes = LaneSettings(choice="grpc" if lane == "grpc" else "auto")
    process = start_process(_serve, num_workers, lanes)
    with running([process]):
        alone = Shards(RULE, xception_layout(1), [process.pipe.recv()], [process])
        load_zeros(alone.control, RULE)
        yield alone
        alone.control.close()


@contextmanager
def _pair(num_workers: int, lane: LaneName) -> Iterator[Shards]:
    """A server and its standby, in step."""
    lanes = LaneSettings(choice="grpc" if lane == "grpc" else "auto")
    processes = [start_process(_serve, num_workers, lanes) for _ in range(2)]
    with running(processes):
        primary, standby = (served.pipe.recv() for served in processes)
        pair = Shards(RULE, xception_layout(1), [primary], processes)
        load_zeros(pair.control, RULE)
        control = ReplicationClient(primary, TOKEN, RetryPolicy())
        control.attach(standby, 1)
        yield pair
        (status,) = pair.control.describe()
        assert status.replica is not None
        assert status.replica.state == "in_step", status.replica
        control.close()
        pair.control.close()


def _updates_per_s(group: Workers, name: str, num_workers: int, seconds: float) -> Measured:
    loops = group.run(name, num_workers, seconds)
    return {"updates_per_s": sum(each.num_updates / each.elapsed_s for each in loops)}


def _rows(lane: LaneName, num_workers: int, num_rounds: int, seconds: float) -> Sequence[Row]:
    works = ("fixed", "replicas 0", "replicas 1")
    fixed, alone, paired = (Cell(lane, work, num_workers) for work in works)
    layout = xception_layout(1)
    with ExitStack() as stack:
        group = stack.enter_context(workers(num_workers, layout))
        servers = {
            fixed: stack.enter_context(shards(1, RULE, LaneSettings(), num_workers)),
            alone: stack.enter_context(_alone(num_workers, lane)),
            paired: stack.enter_context(_pair(num_workers, lane)),
        }
        for cell, served in servers.items():
            lanes = LaneSettings(choice=lane)
            group.open(cell.work, OpenLane(served.addresses, layout, lanes))
        jobs = {
            cell: partial(_updates_per_s, group, cell.work, num_workers, seconds)
            for cell in servers
        }
        for job in jobs.values():
            job()
        rounds = measure(jobs, num_rounds)
    return [
        row_of(fixed, rounds, {}),
        row_of(alone, rounds, {"x_fixed": over(alone, fixed, "updates_per_s")}),
        row_of(paired, rounds, {"x_replicas_0": over(paired, alone, "updates_per_s")}),
    ]


@click.command(help=__doc__)
@click.option("--lane", "lanes", multiple=True, type=click.Choice(LANES), default=LANES)
@click.option("--workers", "num_workers", default=2, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="of each round, and way")
def main(lanes: Sequence[LaneName], num_workers: int, rounds: int, seconds: float) -> None:
    for lane in lanes:
        for row in _rows(lane, num_workers, rounds, seconds):
            print("RESULT", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
