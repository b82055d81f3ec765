"""The price of TLS: pulls and pushes of 22.9 M parameters by gRPC, with and without it.

One server process each way and one caller on loopback; rounds take turns. Prints one line
`RESULT {json}` for each way: GB/s of pulls and of pushes (with their update), and the ratio to the
same without TLS in the same round.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection

import click
import torch
from measured_rows import Cell, Measured, measure, over, row_of
from shard_processes import (
    TOKEN,
    load_zeros,
    running,
    serve,
    shard_config,
    start_process,
    vectors_num_bytes,
    xception_layout,
)

from ps.authority import new_identities
from ps.client import ParameterClient, RetryPolicy
from ps.lanes.lane import LaneSettings
from ps.malloc import tune_malloc
from ps.tls import Identity

RULE = "momentum"
GRPC = LaneSettings(choice="grpc")
PLAIN, ENCRYPTED = Cell("plain", RULE), Cell("tls", RULE)


def _serve(identity: Identity | None, pipe: Connection) -> None:
    server = serve(shard_config(xception_layout(1), 0, RULE), "127.0.0.1", 1, GRPC, identity)
    pipe.send(server.address)
    pipe.poll(None)


def _job(client: ParameterClient) -> Callable[[], Measured]:
    layout = client.layout
    parameters, gradient = torch.zeros(layout.num_parameters), torch.zeros(layout.num_parameters)
    statistics, delta = torch.zeros(layout.num_statistics), torch.zeros(layout.num_statistics)
    giga = vectors_num_bytes(layout) / 1e9
    sequences = iter(range(10**9))

    def exchange() -> Measured:
        start_s = time.perf_counter()
        versions = client.pull(parameters, statistics)
        pulled_s = time.perf_counter()
        client.push(0, 0, next(sequences), versions, 32, gradient, delta)
        pushed_s = time.perf_counter()
        return {
            "pull_gb_per_s": giga / (pulled_s - start_s),
            "push_gb_per_s": giga / (pushed_s - pulled_s),
        }

    return exchange


def _rows(num_rounds: int) -> Sequence[dict[str, object]]:
    own = new_identities()
    ways = {PLAIN: (None, None), ENCRYPTED: (own.server, own.caller)}
    with ExitStack() as stack:
        jobs = {}
        for way, (server, caller) in ways.items():
            served = start_process(_serve, server)
            stack.enter_context(running([served]))
            client = ParameterClient(
                [served.pipe.recv()],
                xception_layout(1),
                TOKEN,
                RetryPolicy(),
                GRPC,
                identity=caller,
            )
            stack.callback(client.close)
            load_zeros(client, RULE)
            jobs[way] = _job(client)
        for job in jobs.values():
            job()
        rounds = measure(jobs, num_rounds)
    figures = ("pull_gb_per_s", "push_gb_per_s")
    ratio = partial(over, ENCRYPTED, PLAIN)
    ratios = {f"x_plain_{figure.partition('_')[0]}": ratio(figure) for figure in figures}
    return [row_of(PLAIN, rounds, {}), row_of(ENCRYPTED, rounds, ratios)]


@click.command(help=__doc__)
@click.option("--rounds", default=15, show_default=True)
def main(rounds: int) -> None:
    torch.set_num_threads(1)
    tune_malloc()
    for row in _rows(rounds):
        print("RESULT", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
