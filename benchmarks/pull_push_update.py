"""Time and memory of one pull, one push and one update of Xception's 22.9 M parameters.

One server process for each shard and one client process on loopback, over the chosen lane. Rounds
interleave the measurements with a memcpy of the same bytes, and what is reported are medians with
the quartiles, and ratios to the memcpy of the same round: absolute figures swing with the
machine's load. Prints one line `RESULT {json}` for each row.
"""

import json
import statistics
import time
from collections import defaultdict
from typing import Any

import click
import torch
from shard_processes import RULES, TOKEN, peak_mb, peak_mb_of, shards

from ps.client import ParameterClient, RetryPolicy
from ps.lanes.lane import LaneName, LaneSettings
from ps.lanes.segment import shared_zeros
from ps.malloc import tune_malloc


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


def _run(client: ParameterClient, num_rounds: int) -> dict[str, dict[str, Any]]:
    layout = client.layout
    parameters = torch.zeros(layout.num_parameters)
    statistics_ = torch.zeros(layout.num_statistics)
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
@click.option("--shards", "num_shards", default=1, show_default=True, help="Server processes.")
@click.option("--rule", default="momentum", type=click.Choice(list(RULES)), show_default=True)
@click.option("--lane", default="shm", type=click.Choice(["shm", "tcp", "grpc"]), show_default=True)
def main(rounds: int, num_shards: int, rule: str, lane: LaneName) -> None:
    """Time and memory of a pull, a push and an update of 22.9 M parameters."""
    torch.set_num_threads(1)
    tune_malloc()
    settings = LaneSettings(choice=lane)
    setup = {"rule": rule, "shards": num_shards, "rounds": rounds, "lane": lane}
    with shards(num_shards, rule, settings, num_workers=1) as group:
        client = ParameterClient(group.addresses, group.layout, TOKEN, RetryPolicy(), settings)
        for name, row in _run(client, rounds).items():
            print("RESULT", json.dumps({"what": name, **setup, **row}))
        client.close()
        peaks = [peak_mb_of(served.pid) for served in group.processes]
    memory = {"servers_peak_mb": round(sum(peaks)), "client_peak_mb": round(peak_mb())}
    print("RESULT", json.dumps({"what": "memory", **setup, **memory}))


if __name__ == "__main__":
    main()
