"""What each option of [consistency] costs a server, at Xception's 22.9 M parameters.

Time of `Shard.push`: the check for NaN and Inf, sums where there are any, and the fused update
with momentum, weight decay and EMA. Every row is a shard of its own; rounds interleave them all
with a memcpy of the parameters. Reported are medians with quartiles, and the median of the
differences to plain async within a round, since absolute figures swing with the machine's load;
processor time, which waiting for a core does not add to, swings less.
Prints one line `RESULT {json}` for each row.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

from model.flat import parameter_segments
from model.registry import create_model
from ps.consistency import Async, Averaging, Bounded, Policy, Sync
from ps.layout import ShardRanges, plan_layout
from ps.push import Push
from ps.rules import Ema, Momentum, Rule, warm_up
from ps.schedule import Constant, Horizon
from ps.shard import Shard, ShardConfig, initial_state

WORKERS = 4
RULE = Momentum(weight_decay=1e-5)
LR = Constant(lr=1e-6)
BASE = "async"


class Pushes:
    """Pushes to one shard, of one gradient over and over."""

    def __init__(self, policy: Policy, ranges: ShardRanges, gradient: Tensor) -> None:
        rule = policy.server_rule(RULE, WORKERS)
        horizon = Horizon(epoch_samples=1_000_000, num_workers=WORKERS)
        config = ShardConfig(ranges, rule, LR, horizon, Ema(), policy)
        start = torch.ones(ranges.parameters.numel)
        self.shard = Shard(config, initial_state(rule, start, torch.empty(0)))
        self._gradient, self._none = gradient, torch.empty(0)
        self._sequence = 0

    def push(self, worker: int, staleness: int = 0) -> None:
        """A push of `worker`, computed `staleness` versions ago."""
        version = self.shard.version - staleness
        self._sequence += 1
        push = Push(worker, 0, self._sequence, version, 32, self._gradient, self._none)
        outcome = self.shard.push(push).outcome.value
        assert outcome in ("applied", "accumulated"), outcome

    def push_all(self, order: Sequence[int]) -> None:
        """One push of each worker."""
        for worker in order:
            self.push(worker)

    def pull(self, worker: int) -> None:
        """As a worker's pull does, without the copy."""
        self.shard.release(self.shard.pin(worker))

    def pull_and_fall_behind(self) -> None:
        """Worker 0 pulls, then worker 1 pushes."""
        self.pull(0)
        self.push(1)


Call = Callable[[], Any]


@dataclass
class Row:
    """Something to time, after `prepare`, which is not counted; `pushes` of one call."""

    call: Call
    prepare: Call | None = None
    pushes: int = 1
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def time(self) -> None:
        """One round."""
        if self.prepare:
            self.prepare()
        wall, cpu = time.perf_counter(), time.process_time()
        self.call()
        self.wall.append((time.perf_counter() - wall) / self.pushes)
        self.cpu.append((time.process_time() - cpu) / self.pushes)


def _stale(policy: Policy, ranges: ShardRanges, gradient: Tensor) -> Row:
    pushes = Pushes(policy, ranges, gradient)
    return Row(partial(pushes.push, 0, 1), pushes.pull_and_fall_behind)


def _each(policy: Policy, ranges: ShardRanges, gradient: Tensor) -> Row:
    pushes = Pushes(policy, ranges, gradient)
    return Row(partial(pushes.push, 0))


def _round(policy: Policy, ranges: ShardRanges, gradient: Tensor, order: Sequence[int]) -> Row:
    pushes = Pushes(policy, ranges, gradient)
    return Row(partial(pushes.push_all, order), pushes=WORKERS)


def _clipping(gradient: Tensor) -> Row:
    """As `worker.gradient` clips: the norm is computed with or without."""
    own = gradient.clone()

    def clip() -> None:
        norm = torch.linalg.vector_norm(own)
        own.mul_((1e9 / norm).clamp_(max=1.0))

    return Row(clip)


def _rows(ranges: ShardRanges) -> dict[str, Row]:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(ranges.parameters.numel, generator=generator).mul_(1e-3)
    half, other = gradient.bfloat16(), torch.empty_like(gradient)
    compensated = Async(delay_compensation=0.04)
    ranks = range(WORKERS)
    outer = Averaging(local_steps=8, asynchronous=True, outer_momentum=0.9)
    return {
        "memcpy": Row(lambda: other.copy_(gradient)),
        BASE: _each(Async(), ranges, gradient),
        "async, bf16 gradient": _each(Async(), ranges, half),
        "async, staleness_lr": _stale(Async(staleness_lr=True), ranges, gradient),
        "async, delay_compensation": _stale(compensated, ranges, gradient),
        "async, delay_compensation, bf16 gradient": _stale(compensated, ranges, half),
        "bounded, slack 3": _each(Bounded(), ranges, gradient),
        "bounded, slack 0": _round(Bounded(slack=0), ranges, gradient, ranks),
        "sync": _round(Sync(), ranges, gradient, ranks),
        "sync, bf16 gradient": _round(Sync(), ranges, half, ranks),
        "sync, deterministic, in order": _round(Sync(deterministic=True), ranges, gradient, ranks),
        "sync, deterministic, backwards": _round(
            Sync(deterministic=True), ranges, gradient, ranks[::-1]
        ),
        "averaging, asynchronous, outer_momentum": _each(outer, ranges, gradient),
        "clip_norm, at the worker": _clipping(gradient),
    }


def _measure(rows: dict[str, Row], num_rounds: int) -> None:
    order = list(rows)
    for round_ in range(num_rounds + 2):
        if round_ == 2:  # the first ones warm up
            for row in rows.values():
                row.wall.clear()
                row.cpu.clear()
        for name in order:
            rows[name].time()
        order = [*order[1:], order[0]]  # each follows another one, which leaves other caches


def _result(name: str, row: Row, base: Row) -> dict[str, Any]:
    low, median, high = (round(1e3 * s, 2) for s in statistics.quantiles(row.wall, n=4))
    walls = list(zip(row.wall, base.wall, strict=True))
    cpus = list(zip(row.cpu, base.cpu, strict=True))
    return {
        "what": name,
        "pushes_timed": len(row.wall) * row.pushes,
        "ms_per_push": median,
        "ms_quartiles": [low, high],
        "cpu_ms_per_push": round(1e3 * statistics.median(row.cpu), 2),
        "ms_more_than_async": round(1e3 * statistics.median(a - b for a, b in walls), 2),
        "cpu_ms_more_than_async": round(1e3 * statistics.median(a - b for a, b in cpus), 2),
        "x async": round(statistics.median(a / b for a, b in walls), 3),
        "x async, cpu": round(statistics.median(a / b for a, b in cpus), 3),
    }


def _warm_up() -> None:
    outer: Rule = Averaging(local_steps=8, asynchronous=True, outer_momentum=0.9).server_rule(
        RULE, WORKERS
    )
    warm_up(RULE, [torch.float32, torch.bfloat16], compensates=True)
    warm_up(outer)


@click.command()
@click.option("--rounds", default=15, show_default=True, help="Rounds that are counted.")
def main(rounds: int) -> None:
    """Time that each option of [consistency] takes at a server, per push of 22.9 M parameters."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        segments = parameter_segments(create_model("xception", 1000))
    (ranges,) = plan_layout(segments, (), 1).shards
    _warm_up()
    rows = _rows(ranges)
    _measure(rows, rounds)
    for name, row in rows.items():
        print("RESULT", json.dumps(_result(name, row, rows[BASE])), flush=True)


if __name__ == "__main__":
    main()
