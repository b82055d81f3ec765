"""Named views of flat vectors, what breaks them, and modules that can't be flattened."""

from collections.abc import Callable

import pytest
import torch
from flat_modules import modules, padding_of, small_xception
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.errors import InputError
from model.flat import (
    FlatModule,
    Segment,
    copy_named_,
    flat_numel,
    named_views,
    parameter_segments,
)

# What breaks the views, and what can't be flattened


def assert_one_line(error: pytest.ExceptionInfo[InputError]) -> None:
    assert "\n" not in str(error.value)


def backward_keeping_the_graph(model: nn.Module) -> None:
    model(torch.randn(2, 3, 40, 40)).square().sum().backward(create_graph=True)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(
    ("breaking", "culprit"),
    [
        (lambda m: m.zero_grad(set_to_none=True), "gradient block1.conv1.weight "),
        (backward_keeping_the_graph, "gradient block1.conv1.weight "),
        (lambda m: m.double(), "parameter block1.conv1.weight "),
        (lambda m: m.to("meta"), "parameter block1.conv1.weight "),
        (lambda m: m.to(memory_format=torch.channels_last), "parameter block1.conv1.weight "),
        (lambda m: m.load_state_dict(small_xception().state_dict(), assign=True), "parameter "),
        (lambda m: setattr(m.head, "dense", nn.Linear(104, 5)), "parameter head.dense.weight "),
        (lambda m: setattr(m.head, "dense", nn.Identity()), "parameter head.dense.weight "),
        (lambda m: setattr(m, "extra", nn.Linear(1, 1)), "parameter extra.weight "),
        (lambda m: m.block1.bn2.register_buffer("running_var", torch.ones(8)), "statistic block1"),
        (lambda m: m.register_buffer("extra", torch.ones(8)), "statistic extra "),
        (FlatModule, "parameter block1.conv1.weight "),
    ],
)
def test_broken_views_are_found(breaking: Callable[[nn.Module], object], culprit: str) -> None:
    flat = FlatModule(small_xception())
    flat.check_views()
    breaking(flat.module)
    with pytest.raises(InputError, match=f"^{culprit}") as error:
        flat.check_views()
    assert_one_line(error)


def test_a_sparse_gradient_is_found() -> None:
    module = nn.Embedding(4, 2, sparse=True)
    flat = FlatModule(module)
    module.zero_grad(set_to_none=True)
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match=r"^gradient weight "):
        flat.check_views()


def frozen() -> nn.Module:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    return module


def half_statistics() -> nn.Module:
    module = nn.BatchNorm1d(2)
    module.register_buffer("running_var", torch.ones(2).half())
    return module


def partly_on_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


def on_two_devices() -> nn.Module:
    with FakeTensorMode():
        elsewhere = nn.Parameter(torch.empty(2, device="cuda:0"))
    return nn.ParameterList([nn.Parameter(torch.zeros(2)), elsewhere])


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (frozen, "parameter bias is frozen"),
        (lambda: nn.Linear(2, 2).double(), "weight is torch.float64"),
        (lambda: nn.Linear(2, 2).bfloat16(), "weight is torch.bfloat16"),
        (half_statistics, "running_var is torch.float16"),
        (lambda: nn.Sequential(nn.ReLU(), nn.LazyLinear(3)), "1.weight is lazy"),
        (lambda: nn.LazyBatchNorm1d(affine=False), "running_mean is lazy"),
        (partly_on_meta, "1.weight is on the meta device"),
        (on_two_devices, "1 is on cuda:0 and others are on cpu"),
    ],
)
def test_modules_that_cannot_be_flattened(build: Callable[[], nn.Module], complaint: str) -> None:
    module = build()
    with pytest.raises(InputError, match=f"^{complaint}") as error:
        FlatModule(module)
    assert_one_line(error)
    assert all(parameter.grad is None for parameter in module.parameters())


# Named views


@settings(deadline=None)
@given(module=modules, dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_copying_views_of_one_vector_into_another_copies_all_but_padding(
    module: nn.Module, dtype: torch.dtype
) -> None:
    segments = parameter_segments(module)
    source = torch.randn(flat_numel(segments))
    target = torch.full_like(source, 7, dtype=dtype)
    copy_named_(target, segments, named_views(source, segments))
    copied = named_views(target, segments)
    assert {name: tuple(view.shape) for name, view in copied.items()} == {
        segment.name: segment.shape for segment in segments
    }
    for name, view in named_views(source, segments).items():
        assert torch.equal(copied[name], view.to(dtype))
    assert (padding_of(target, segments) == 7).all()


SEGMENTS = (
    Segment("a", (2, 3), 0, decayed=True),
    Segment("b", (17,), 16, decayed=False),
    Segment("c", (), 48, decayed=False),
)


def test_views_lie_at_their_offsets_and_share_memory() -> None:
    vector = torch.arange(64.0)
    views = named_views(vector, SEGMENTS)
    assert list(views) == ["a", "b", "c"]
    assert views["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert views["b"].tolist() == list(range(16, 33))
    assert views["c"].item() == 48
    views["a"][1, 2] = -1
    assert vector[5] == -1


@pytest.mark.parametrize("shape", [(63,), (80,), (1, 64)])
def test_a_vector_of_another_layout_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="length"):
        named_views(torch.zeros(shape), SEGMENTS)


def test_copying_parameters_does_not_make_the_vector_require_gradients() -> None:
    module = nn.Linear(3, 2)
    segments = parameter_segments(module)
    vector = torch.zeros(flat_numel(segments))
    copy_named_(vector, segments, dict(module.named_parameters()))
    assert not vector.requires_grad
    assert torch.equal(vector[:6].view(2, 3), module.weight)


A, B, C = torch.ones(2, 3), torch.ones(17), torch.ones(())


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({}, "tensor 'a' is missing"),
        ({"a": A, "c": C}, "tensor 'b' is missing"),
        ({"a": A, "b": B, "c": C, "z": C, "d": C}, "tensor 'z' is none of the model's"),
        (
            {"a": A.T, "b": B, "c": C},
            r"tensor 'a' has shape \(3, 2\), and the model's has \(2, 3\)",
        ),
        ({"a": A, "b": B, "c": C[None]}, r"tensor 'c' has shape \(1,\), and the model's has \(\)"),
        ({"a": A, "b": B[:1], "c": C}, r"tensor 'b' has shape \(1,\)"),
    ],
)
def test_wrong_tensors_are_named_and_nothing_is_copied(
    tensors: dict[str, Tensor], complaint: str
) -> None:
    vector = torch.zeros(64)
    with pytest.raises(InputError, match=f"^{complaint}") as error:
        copy_named_(vector, SEGMENTS, tensors)
    assert_one_line(error)
    assert not vector.any()
