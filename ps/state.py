"""A shard's settings, and a copy of its state at one version."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ps.consistency import Policy
from ps.layout import Range, ShardRanges
from ps.rules import Ema, Rule
from ps.schedule import Clocks, Horizon, Schedule


@dataclass(frozen=True)
class ShardConfig:
    """All that a shard needs besides its first state."""

    ranges: ShardRanges
    rule: Rule
    schedule: Schedule
    horizon: Horizon
    ema: Ema
    policy: Policy

    def vector_numels(self) -> dict[str, int]:
        """Names of a state's vectors, and how many elements each has at this shard."""
        return {n: vector_range(self.ranges, n).numel for n in vector_names(self.rule)}


def vector_range(ranges: ShardRanges, vector: str) -> Range:
    """Which part of the whole flat vector of this name a shard holds."""
    return ranges.statistics if vector.endswith("statistics") else ranges.parameters


def vector_names(rule: Rule) -> tuple[str, ...]:
    """The vectors of a state, in the order in which they travel."""
    slots = (f"slot.{name}" for name in rule.slots)
    return ("parameters", "statistics", "ema", "ema_statistics", *slots)


@dataclass(frozen=True)
class ShardState:
    """A copy of a shard at one version.

    `vectors` are flat: "parameters", "statistics", "ema", "ema_statistics" and "slot.NAME".
    `last_sequences` maps worker and incarnation to the newest push that is in the state; -1 stands
    for a life that has pushed nothing yet, but before which all earlier ones are fenced.
    """

    clocks: Clocks
    vectors: Mapping[str, Tensor]
    last_sequences: Mapping[int, Mapping[int, int]] = field(default_factory=dict)


def initial_state(rule: Rule, parameters: Tensor, statistics: Tensor) -> ShardState:
    """The state that training starts from: the EMA at the parameters, slots at their first values.

    `parameters` and `statistics` may be a shard's range or the whole flat vectors.
    """
    slots = {f"slot.{n}": torch.full_like(parameters, v) for n, v in rule.slots.items()}
    averages = {"ema": parameters.clone(), "ema_statistics": statistics.clone()}
    return ShardState(
        Clocks(), {"parameters": parameters, "statistics": statistics, **averages, **slots}
    )
