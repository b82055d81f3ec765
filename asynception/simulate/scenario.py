"""What a seed stands for: a run's settings, the weather, and who dies when."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from asynception.config import TrainConfig
from asynception.ledger import BatchLeases
from asynception.plan import ModelPlan, RunPlan
from asynception.simulate.network import Weather
from model.flat import Segment
from ps.checkpoint import ModelLayout
from ps.client import ModelState
from ps.layout import Layout, Range, ShardRanges
from ps.shard import initial_state
from worker.data.summary import DataSummary

FaultKind = Literal[
    "node",
    "worker",
    "zombie",
    "server",
    "zombie server",
    "cut server",
    "frozen server",
    "coordinator",
    "evaluator",
    "cut",
    "frozen",
    "sigterm",
    "drain",
    "scale",
    "notice",
    "host",
]

SHARD_NUMEL = 32
"""Parameters of a shard; it has half as many statistics. Two messages of `CHUNK_NUM_BYTES`."""

CHUNK_NUM_BYTES = 64
START = 1000.0
"""Every parameter and statistic at the start."""


@dataclass(frozen=True)
class Fault:
    """Something that happens to a party: at a time, for so long where that makes sense."""

    kind: FaultKind
    at_s: float
    seconds: float
    choice: float
    """Which of the parties that there are then, from 0 to 1."""


@dataclass(frozen=True)
class Scenario:
    """One run. All of it follows from the seed."""

    seed: int
    config: TrainConfig
    total_samples: int
    corrupt: frozenset[int]
    """Positions of samples that don't decode."""
    not_finite: float
    """Share of gradients that are NaN."""
    compute_s: float
    prefetch_batches: int
    weather: Weather
    faults: tuple[Fault, ...]
    joins_s: tuple[float, ...] = ()
    """When there is a node for each worker, if their number is a range."""
    num_hosts: int = 2
    """Nodes that have servers, at the start."""

    @property
    def exact(self) -> bool:
        """Whether parameters are sums of small whole numbers, for which float32 has no error."""
        return self.config.consistency.mode in ("async", "bounded")


def draw(
    seed: int,
    mode: str | None = None,
    *,
    nodes: bool = False,
    replicas: int = 0,
    elastic: bool = False,
    notices: bool = False,
    losses: bool = False,
) -> Scenario:
    """The scenario of a seed; `mode` settles the consistency. nodes: workers' nodes die as well.

    replicas: of each server; with them, or with losses, more happens to servers. elastic: workers
    join, leave and are scaled. notices: nodes of servers are drained, and gone some time later.
    """
    dice = random.Random(f"scenario {seed}")
    num_workers, num_servers = dice.randint(1, 4), dice.randint(1, 3)
    policy = _policy(dice, mode or dice.choice(_MODES), num_workers)
    batch_size = dice.randint(1, 4)
    total = batch_size * dice.randint(8, 40)
    may_overlap = policy["mode"] == "async" or policy.get("slack", 0) > 0
    overlap = dice.random() < 0.4 and may_overlap
    changes = _Changes(seed, policy["mode"], num_workers) if elastic else None
    counts = changes.counts if changes else num_workers
    accumulated = dice.choice((1, 1, 2)) if policy["mode"] not in _LOCAL else 1
    config = TrainConfig.model_validate(
        {
            "data": _data(batch_size, dice.randint(1, 4)),
            "training": {
                "samples": total,
                "accumulate_grad_batches": accumulated,
                "max_not_finite": 1000,
            },
            **_SAME_FOR_ALL,
            "consistency": policy,
            "evaluation": {"every_epochs": dice.uniform(0.2, 1)},
            "scaling": {"num_workers": counts, "num_servers": num_servers, "replicas": replicas},
            "checkpoint": {"every_s": dice.uniform(1, 8)},
            "pipeline": {"overlap": overlap},
        }
    )
    heals_s = dice.uniform(5, 25)
    return Scenario(
        seed,
        config,
        total,
        frozenset(_some(dice, total, dice.choice((0.0, 0.0, 0.1)))),
        dice.choice((0.0, 0.0, 0.05)),
        dice.uniform(0.01, 0.3),
        dice.randint(0, 3),
        _weather(dice, heals_s),
        (
            *_faults(dice, heals_s),
            *_more_faults(seed, heals_s, nodes, losses or replicas > 0, changes, notices),
        ),
        changes.joins_s(heals_s) if changes else (),
        random.Random(f"hosts {seed}").randint(1, 4) if notices else 2,
    )


def _data(batch_size: int, lease_batches: int) -> dict[str, Any]:
    counts = {"batch_size": batch_size, "lease_batches": lease_batches, "max_corrupt": 1000}
    return {"train": "none", "val": "none", **counts}


_SAME_FOR_ALL: Mapping[str, Any] = {
    "optimizer": {"name": "sgd"},
    "schedule": {"kind": "constant", "lr": 1.0},
    "failure": {
        "max_failures": -1,
        "max_worker_failures": -1,
        "max_fruitless_failures": 1000,
        "worker_timeout_s": 40.0,
        "server_timeout_s": 6.0,
    },
    "run": {"placement_timeout_s": 1000.0},
    "network": {"attempt_s": 2.0, "deadline_s": 20.0, "backoff_s": 0.1},
    "lanes": {"choice": "grpc"},
}

_MODES = ("async", "async", "bounded", "sync", "averaging")
_LOCAL = ("averaging", "elastic")


def _policy(dice: random.Random, mode: str, num_workers: int) -> dict[str, Any]:
    if mode == "bounded":
        return {"mode": mode, "slack": dice.randint(0, 3)}
    if mode == "sync":
        backup = dice.randint(0, num_workers - 1)
        return {"mode": mode, "backup_workers": backup, "deterministic": _flip(dice) and not backup}
    if mode == "averaging":
        steps = dice.choice((1, 2, 3, None))
        return {"mode": mode, "local_steps": steps, "asynchronous": _flip(dice)}
    if mode == "elastic":
        rate = dice.choice((None, 0.5 / num_workers))
        return {"mode": mode, "local_steps": dice.randint(1, 3), "moving_rate": rate}
    return {
        "mode": "async",
        "max_staleness": dice.choice((None, None, 2)),
        "ramp_up_epochs": dice.choice((0.0, 0.0, 0.5)),
    }


def _flip(dice: random.Random) -> bool:
    return dice.random() < 0.5


def _some(dice: random.Random, total: int, share: float) -> list[int]:
    return [position for position in range(total) if dice.random() < share]


def _weather(dice: random.Random, heals_s: float) -> Weather:
    return Weather(
        latency_s=dice.choice((0.001, 0.01, 0.05)),
        lost=dice.choice((0.0, 0.02, 0.1)),
        repeated=dice.choice((0.0, 0.05, 0.2)),
        late=dice.choice((0.0, 0.02, 0.1)),
        late_s=dice.choice((0.5, 3.0, 8.0)),
        heals_s=heals_s,
    )


_KINDS: tuple[FaultKind, ...] = (
    "worker",
    "worker",
    "zombie",
    "server",
    "coordinator",
    "evaluator",
    "cut",
    "cut",
    "frozen",
)


def _faults(dice: random.Random, heals_s: float) -> list[Fault]:
    kinds = [dice.choice(_KINDS) for _ in range(dice.randint(0, 6))]
    at_s = sorted(dice.uniform(0.1, heals_s) for _ in kinds)
    return [
        Fault(kind, each, dice.choice((0.5, 3.0, 15.0)), dice.random())
        for kind, each in zip(kinds, at_s, strict=True)
    ]


def _lost_nodes(seed: int, heals_s: float) -> Iterator[Fault]:
    """By dice of their own, so that the rest of a seed is the same with and without them."""
    dice = random.Random(f"nodes {seed}")
    for _ in range(dice.randint(1, 3)):
        yield Fault(
            "node", dice.uniform(0.1, heals_s), dice.choice((0.5, 15.0, 150.0)), dice.random()
        )


_SERVER_KINDS: tuple[FaultKind, ...] = (
    "server",
    "server",
    "zombie server",
    "cut server",
    "frozen server",
)


def _lost_servers(seed: int, heals_s: float) -> Iterator[Fault]:
    """By dice of their own."""
    dice = random.Random(f"servers {seed}")
    for _ in range(dice.randint(1, 6)):
        kind, at_s = dice.choice(_SERVER_KINDS), dice.uniform(0.1, heals_s)
        yield Fault(kind, at_s, dice.choice((3.0, 15.0)), dice.random())


def _notices(seed: int, heals_s: float) -> Iterator[Fault]:
    """By dice of their own. In the end there are nodes that stay."""
    dice = random.Random(f"notices {seed}")
    for _ in range(dice.randint(1, 4)):
        seconds = dice.choice((0.5, 3.0, 15.0, 60.0))
        yield Fault("notice", dice.uniform(0.1, heals_s), seconds, dice.random())
        yield Fault("host", dice.uniform(0.1, heals_s), 0.0, 0.0)


def _more_faults(
    seed: int,
    heals_s: float,
    nodes: bool,
    servers: bool,
    changes: "_Changes | None",
    notices: bool,
) -> Iterator[Fault]:
    """What was asked for besides; the rest of a seed is the same without it."""
    if nodes:
        yield from _lost_nodes(seed, heals_s)
    if servers:
        yield from _lost_servers(seed, heals_s)
    if changes is not None:
        yield from changes.events(heals_s)
    if notices:
        yield from _notices(seed, heals_s)


class _Changes:
    """How the number of workers changes; by dice of its own, as `_lost_nodes`."""

    def __init__(self, seed: int, mode: str, num_workers: int) -> None:
        self._dice = random.Random(f"elastic {seed}")
        takes_joins = mode in ("async", "bounded", "elastic")
        self._is_range = takes_joins and self._dice.random() < 0.7
        self._least, self._most = self._dice.randint(1, num_workers), num_workers
        self._kinds: list[FaultKind] = ["sigterm"]
        self._kinds += ["scale"] if takes_joins else []
        self._kinds += ["drain"] if self._is_range else []

    @property
    def counts(self) -> int | list[int]:
        """`scaling.num_workers`."""
        return [self._least, self._most] if self._is_range else self._most

    def joins_s(self, heals_s: float) -> tuple[float, ...]:
        """When each place has a node for the first time, if it has one by itself."""
        later = range(self._most - self._least)
        first = [0.0] * self._least
        joins = (*first, *(self._dice.uniform(0, heals_s) for _ in later))
        return joins if self._is_range else ()

    def events(self, heals_s: float) -> Iterator[Fault]:
        """Notices to leave, and orders to be more or fewer."""
        for _ in range(self._dice.randint(2, 8)):
            kind, at_s = self._dice.choice(self._kinds), self._dice.uniform(0.1, heals_s)
            yield Fault(kind, at_s, 0.0, self._dice.random())


def plan_of(scenario: Scenario) -> RunPlan:
    """A plan without data: the model is two flat vectors of equal numbers."""
    config = scenario.config
    num_shards, half = config.scaling.num_servers, SHARD_NUMEL // 2
    ranges = [
        ShardRanges(
            Range(shard * SHARD_NUMEL, (shard + 1) * SHARD_NUMEL),
            Range(shard * half, (shard + 1) * half),
            (),
        )
        for shard in range(num_shards)
    ]
    tensors = ModelLayout(segments("parameters", num_shards), segments("statistics", num_shards))
    model = ModelPlan(config, 1, tensors, Layout(tuple(ranges)))
    total, data = scenario.total_samples, config.data
    summary = DataSummary(total, (total,), 1, torch.tensor([total]))
    lease_end = BatchLeases(data.batch_size, data.lease_batches)
    return RunPlan(model, summary, 1, total, {}, lease_end)


def segments(name: str, num_shards: int) -> tuple[Segment, ...]:
    """One tensor for all shards."""
    numel = num_shards * (SHARD_NUMEL if name == "parameters" else SHARD_NUMEL // 2)
    return (Segment(name, (numel,), 0, False),)


def first_state(plan: RunPlan) -> ModelState:
    """Where the run begins."""
    layout, rule = plan.model.layout, plan.config.server_rule
    parameters = torch.full((layout.num_parameters,), START)
    statistics = torch.full((layout.num_statistics,), START)
    state = initial_state(rule, parameters, statistics)
    return ModelState(state.clocks, state.vectors, {})
