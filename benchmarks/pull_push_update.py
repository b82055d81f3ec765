"""Time and memory of one pull, one push and one update of Xception's 22.9 M parameters.

One server process for each shard and one client process on loopback, over the chosen lane. Rounds
interleave the measurements with a memcpy of the same bytes, and what is reported are medians with
the quartiles, and ratios to the memcpy of the same round: absolute figures swing with the
machine's load. Prints one line `RESULT {json}` for each row.
"""

import json
import multiprocessing as mp
import resource
import statistics
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from typing import Any

import click
import torch

from model.flat import Segment
from ps.client import ModelState, ParameterClient, RetryPolicy
from ps.consistency import Async
from ps.lanes.lane import LaneName, LaneSettings
from ps.lanes.segment import shared_zeros
from ps.layout import Layout, plan_layout
from ps.malloc import tune_malloc
from ps.rules import Ema, Momentum, RMSprop, Rule
from ps.schedule import Constant, Horizon
from ps.server import ShardServer
from ps.service import ShardService
from ps.shard import ShardConfig, initial_state

NUM_PARAMETERS, NUM_STATISTICS = 22_855_952, 54_528
RULES: dict[str, Rule] = {
    "momentum": Momentum(weight_decay=1e-5),
    "rmsprop": RMSprop(weight_decay=1e-5),
}
TOKEN = "benchmark"


def _layout(num_shards: int) -> Layout:
    parameters = (Segment("kernels", (NUM_PARAMETERS,), 0, decayed=True),)
    statistics = (Segment("statistics", (NUM_STATISTICS,), 0, decayed=False),)
    return plan_layout(parameters, statistics, num_shards)


def _serve(layout: Layout, shard: int, rule: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    tune_malloc()
    horizon = Horizon(epoch_samples=1_281_167, num_workers=1)
    config = ShardConfig(
        layout.shards[shard], RULES[rule], Constant(lr=1e-6), horizon, Ema(), Async()
    )
    server = ShardServer(ShardService(config), "127.0.0.1", TOKEN, num_workers=1)
    server.start()
    pipe.send(server.address)
    pipe.recv()
    pipe.send(_peak_mb())
    server.stop()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class _Rounds:
    """Seconds by what was measured."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def measure(self, name: str, call: Any) -> Any:
        start_s = time.perf_counter()
        value = call()
        self.seconds[name].append(time.perf_counter() - start_s)
        return value

    def rows(self) -> dict[str, dict[str, Any]]:
        return {name: _row(values, self.seconds["memcpy"]) for name, values in self.seconds.items()}


def _row(values: list[float], memcpy: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(values, n=4)
    ratios = [value / base for value, base in zip(values, memcpy, strict=True)]
    return {
        "ms": round(1e3 * median, 1),
        "ms_quartiles": [round(1e3 * low, 1), round(1e3 * high, 1)],
        "x_memcpy": round(statistics.median(ratios), 2),
    }


def _run(client: ParameterClient, rule: str, num_rounds: int) -> dict[str, dict[str, Any]]:
    layout = client.layout
    parameters = torch.zeros(layout.num_parameters)
    statistics_ = torch.zeros(layout.num_statistics)
    start = initial_state(RULES[rule], parameters, statistics_)
    client.load(ModelState(start.clocks, start.vectors, {}))
    # Where a worker keeps them, so that the shm lane copies nothing.
    gradient, delta = shared_zeros(parameters.numel()), shared_zeros(statistics_.numel())
    gradient.fill_(1e-3)
    copy, rounds = torch.zeros_like(parameters), _Rounds()
    applied_s = 0.0
    for sequence in range(num_rounds + 1):
        if sequence == 1:
            rounds = _Rounds()  # the first round touches all memory for the first time
        rounds.measure("memcpy", lambda: copy.copy_(gradient))
        versions = rounds.measure("pull", lambda: client.pull(parameters, statistics_))
        rounds.measure(
            "push and update",
            lambda s=sequence, v=versions: client.push(0, 0, s, v, 32, gradient, delta),
        )
        total_s = max(status.apply_s for status in client.describe())
        rounds.seconds["update alone"].append(total_s - applied_s)
        applied_s = total_s
    return rounds.rows()


@click.command()
@click.option("--rounds", default=15, show_default=True, help="Rounds that are counted.")
@click.option("--shards", default=1, show_default=True, help="Server processes.")
@click.option("--rule", default="momentum", type=click.Choice(list(RULES)), show_default=True)
@click.option("--lane", default="shm", type=click.Choice(["shm", "tcp", "grpc"]), show_default=True)
def main(rounds: int, shards: int, rule: str, lane: LaneName) -> None:
    """Time and memory of a pull, a push and an update of 22.9 M parameters."""
    torch.set_num_threads(1)
    context = mp.get_context("spawn")
    layout = _layout(shards)
    pipes, processes = [], []
    for shard in range(shards):
        near, far = context.Pipe()
        process = context.Process(target=_serve, args=(layout, shard, rule, far), daemon=True)
        process.start()
        pipes.append(near)
        processes.append(process)
    addresses = [pipe.recv() for pipe in pipes]
    tune_malloc()
    client = ParameterClient(addresses, layout, TOKEN, RetryPolicy(), LaneSettings(choice=lane))
    setup = {"rule": rule, "shards": shards, "rounds": rounds, "lane": lane}
    for name, row in _run(client, rule, rounds).items():
        print("RESULT", json.dumps({"what": name, **setup, **row}))
    for pipe in pipes:
        pipe.send("end")
    peaks = [pipe.recv() for pipe in pipes]
    client.close()
    for process in processes:
        process.join()
    memory = {"servers_peak_mb": round(sum(peaks)), "client_peak_mb": round(_peak_mb())}
    print("RESULT", json.dumps({"what": "memory", **setup, **memory}))


if __name__ == "__main__":
    main()
