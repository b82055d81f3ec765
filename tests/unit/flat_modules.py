"""Modules to flatten: drawn ones, a small Xception, and one whose kernels are tied."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from model.flat import (
    Segment,
)
from model.registry import create_model


def small_xception() -> nn.Module:
    torch.manual_seed(0)
    return create_model("xception", 5, width=0.05, middle_blocks=1)


class Tied(nn.Module):
    """Tied weights, a scalar and an empty parameter, and buffers of all kinds."""

    scratch: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.dense = nn.Linear(5, 7)
        self.dense.weight = self.embedding.weight
        self.register_buffer("ema", torch.arange(3.0))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.register_buffer("calls", torch.tensor(4))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.dense(self.embedding(ids))
        return logits


sizes = st.integers(1, 5)
layers = st.one_of(
    st.builds(partial, st.just(nn.Linear), st.integers(1, 40), st.integers(1, 9)),
    st.builds(partial, st.just(nn.Linear), sizes, sizes, bias=st.booleans()),
    st.builds(partial, st.just(nn.Conv1d), sizes, sizes, sizes),
    st.builds(partial, st.just(nn.Conv2d), sizes, sizes, sizes),
    st.builds(partial, st.just(nn.ConvTranspose2d), sizes, sizes, sizes),
    st.builds(partial, st.just(nn.BatchNorm2d), st.integers(1, 40), affine=st.booleans()),
    st.builds(partial, st.just(nn.LayerNorm), st.integers(1, 40)),
    st.just(Tied),
)


def stack(parts: Sequence[Callable[[], nn.Module]]) -> nn.Module:
    return nn.Sequential(*(part() for part in parts))


stacks = st.lists(layers, max_size=6)
modules = stacks.map(stack)


def padding_of(vector: Tensor, segments: tuple[Segment, ...]) -> Tensor:
    is_padding = torch.ones(vector.numel(), dtype=torch.bool)
    for segment in segments:
        is_padding[segment.offset : segment.stop] = False
    return vector.masked_select(is_padding)


def assert_same_state(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
