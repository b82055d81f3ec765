"""Where a session of a run begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asynception.ledger import START, Position
from asynception.plan import RunPlan, first_state
from asynception.totals import Totals
from ps.client import ModelState
from ps.schedule import Clocks


@dataclass(frozen=True)
class Origin:
    """A state, its place in the data, and what was counted before."""

    state: ModelState
    position: Position = START
    totals: Totals = field(default_factory=Totals)
    wall_s: float = 0.0
    shard_clocks: Sequence[Clocks] | None = None
    """Of each shard, where they differ; else all are those of the state."""
    checkpoint: str | None = None
    """Name of the checkpoint that it is."""


def new_origin(plan: RunPlan) -> Origin:
    """The start of a new run."""
    return Origin(first_state(plan.model))


def origin_from(extra: Mapping[str, Any], state: ModelState, checkpoint: str) -> Origin:
    """Where to go on from a checkpoint of this name."""
    return Origin(
        state,
        Position.from_json(extra["position"]),
        Totals.from_json(extra["totals"]),
        extra["wall_s"],
        checkpoint=checkpoint,
    )
