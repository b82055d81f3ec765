"""Random states of a small model, written and read as checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ps.checkpoint as checkpoint
from model.errors import InputError
from model.flat import Segment, flat_numel, named_views
from ps.checkpoint import (
    ModelLayout,
    read_checkpoint,
)
from ps.client import ModelState
from ps.rules import SGD, Momentum, RMSprop, Rule
from ps.schedule import Clocks

RULES: list[Rule] = [SGD(), Momentum(), RMSprop()]


def segments(prefix: str, shapes: list[tuple[int, ...]]) -> tuple[Segment, ...]:
    laid_out: list[Segment] = []
    for index, shape in enumerate(shapes):
        offset = flat_numel(laid_out)
        laid_out.append(Segment(f"{prefix}.{index}", shape, offset, index % 2 == 0))
    return tuple(laid_out)


LAYOUT = ModelLayout(
    segments("weight", [(3, 4), (), (0, 2), (17,), (2, 2, 2, 2), (40,)]),
    segments("bn", [(5,), (20,)]),
)


def random_vector(within: tuple[Segment, ...], seed: int) -> Tensor:
    """Padding is zero, as it is in a run."""
    vector = torch.zeros(flat_numel(within))
    generator = torch.Generator().manual_seed(seed)
    for view in named_views(vector, within).values():
        view.copy_(torch.randn(view.shape, generator=generator))
    return vector


def random_state(
    layout: ModelLayout = LAYOUT, rule: Rule = RULES[1], updates: int = 7, seed: int = 0
) -> ModelState:
    names = ("parameters", "ema", *(f"slot.{slot}" for slot in rule.slots))
    vectors = {n: random_vector(layout.parameters, seed + i) for i, n in enumerate(names)}
    for index, name in enumerate(("statistics", "ema_statistics")):
        vectors[name] = random_vector(layout.statistics, seed + 100 + index)
    return ModelState(Clocks(updates, 32 * updates), vectors, {0: {0: 3}}, 2)


def read(path: Path, rule: Rule = RULES[1], layout: ModelLayout = LAYOUT) -> checkpoint.Checkpoint:
    return read_checkpoint(path, layout, tuple(rule.slots))


def same(first: ModelState, second: ModelState) -> bool:
    return (
        first.clocks == second.clocks
        and set(first.vectors) == set(second.vectors)
        and all(torch.equal(v, second.vectors[name]) for name, v in first.vectors.items())
    )


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text
