"""What it costs a pull to be told which pushes are in the version, by the number of workers.

One server process and one client process on loopback, over the chosen lane. A pull as a worker,
which is told, and one as nobody, which is not, take turns at going first, so that both meet the
same load; what is reported are medians, and the median of their ratio. The layout is Xception's, or
that of a model so small that hardly anything else is left. Prints one line `RESULT {json}` for each
number of workers.
"""

import json
import statistics
import time
from multiprocessing.connection import Connection

import click
import torch
from shard_processes import (
    HOST,
    RULES,
    START,
    TOKEN,
    running,
    serve,
    shard_config,
    start_process,
    wait_for_end,
    xception_layout,
)

from model.flat import Segment
from ps.client import ModelState, ParameterClient, RetryPolicy
from ps.lanes.lane import LaneName, LaneSettings
from ps.layout import Layout, plan_layout
from ps.malloc import tune_malloc
from ps.state import ShardConfig, initial_state

RULE, SMALL_NUMEL = "sgd", 1024


def _small_layout() -> Layout:
    return plan_layout((Segment("weight", (SMALL_NUMEL,), 0, True),), (), 1)


def _load(client: ParameterClient, num_workers: int) -> None:
    """A state in which so many workers have pushed a hundred thousand times."""
    vectors = (torch.zeros(client.layout.num_parameters), torch.zeros(client.layout.num_statistics))
    lives = {worker: {worker % 3: 100_000 + worker} for worker in range(num_workers)}
    client.load(ModelState(START, initial_state(RULES[RULE], *vectors).vectors, lives))


def _measure(client: ParameterClient, num_rounds: int) -> dict[str, float]:
    layout = client.layout
    parameters, deltas = torch.zeros(layout.num_parameters), torch.zeros(layout.num_statistics)

    def pull_ms(worker: int | None) -> float:
        start_s = time.perf_counter()
        client.pull(parameters, deltas, None, worker)
        return 1e3 * (time.perf_counter() - start_s)

    told, not_told = [], []
    for number in range(num_rounds + 1):
        if number % 2:
            told.append(pull_ms(0))
        not_told.append(pull_ms(None))
        if not number % 2:
            told.append(pull_ms(0))
    ratios = [mine / other for mine, other in zip(told[1:], not_told[1:], strict=True)]
    return {
        "told_ms": round(statistics.median(told[1:]), 4),
        "not_told_ms": round(statistics.median(not_told[1:]), 4),
        "ratio": round(statistics.median(ratios), 3),
    }


def _serve(config: ShardConfig, lanes: LaneSettings, pipe: Connection) -> None:
    server = serve(config, HOST, 1, lanes)
    pipe.send(server.address)
    wait_for_end(pipe)
    server.stop()


@click.command()
@click.option("--rounds", default=200, show_default=True, help="Pulls of each kind.")
@click.option("--lane", default="shm", type=click.Choice(["shm", "tcp", "grpc"]), show_default=True)
@click.option("--small", is_flag=True, help=f"{SMALL_NUMEL} parameters instead of 22.9 M.")
@click.option("--workers", default=(1, 8, 200), multiple=True, show_default=True)
def main(rounds: int, lane: LaneName, small: bool, workers: tuple[int, ...]) -> None:
    """Time of a pull that is told what is in its version, and of one that is not."""
    torch.set_num_threads(1)
    tune_malloc()
    layout, settings = _small_layout() if small else xception_layout(1), LaneSettings(choice=lane)
    server = start_process(_serve, shard_config(layout, 0, RULE), settings)
    with running([server]):
        client = ParameterClient([server.pipe.recv()], layout, TOKEN, RetryPolicy(), settings)
        for num_workers in workers:
            _load(client, num_workers)
            row = {"lane": lane, "small": small, "workers": num_workers, "rounds": rounds}
            print("RESULT", json.dumps(row | _measure(client, rounds)))
        client.close()


if __name__ == "__main__":
    main()
