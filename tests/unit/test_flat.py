"""Flat vectors against an untouched copy of the module, and the layout's own laws."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.errors import InputError
from model.flat import (
    ALIGNMENT,
    FlatModule,
    Segment,
    copy_named_,
    flat_numel,
    named_views,
    parameter_segments,
    statistic_segments,
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


# Layout


@settings(deadline=None)
@given(module=modules)
def test_segments_are_aligned_disjoint_and_tight(module: nn.Module) -> None:
    for segments in (parameter_segments(module), statistic_segments(module)):
        end = 0
        for segment in segments:
            assert segment.offset % ALIGNMENT == 0
            assert 0 <= segment.offset - end < ALIGNMENT
            assert (
                segment.stop - segment.offset == segment.numel == torch.Size(segment.shape).numel()
            )
            end = segment.stop
        assert flat_numel(segments) % ALIGNMENT == 0
        assert 0 <= flat_numel(segments) - end < ALIGNMENT


@settings(deadline=None)
@given(module=modules)
def test_segments_name_every_tensor_in_order(module: nn.Module) -> None:
    parameters = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    state = module.state_dict()
    statistics = [
        (name, tuple(buffer.shape))
        for name, buffer in module.named_buffers()
        if name in state and buffer.dtype.is_floating_point
    ]
    assert [(s.name, s.shape) for s in parameter_segments(module)] == parameters
    assert [(s.name, s.shape) for s in statistic_segments(module)] == statistics


@settings(deadline=None)
@given(parts=stacks)
def test_a_module_built_on_the_meta_device_has_the_same_layout(
    parts: Sequence[Callable[[], nn.Module]],
) -> None:
    module = stack(parts)
    with torch.device("meta"):
        on_meta = stack(parts)
    assert parameter_segments(on_meta) == parameter_segments(module)
    assert statistic_segments(on_meta) == statistic_segments(module)


def test_the_full_model_is_laid_out_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = create_model("xception", 1000)
    parameters, statistics = parameter_segments(model), statistic_segments(model)
    assert sum(segment.numel for segment in parameters) == 22_855_952
    assert sum(segment.numel for segment in statistics) == 54_528
    assert parameters[0] == Segment("block1.conv1.weight", (32, 3, 3, 3), 0, decayed=True)


def test_kernels_decay_and_biases_and_norms_do_not() -> None:
    module = nn.ModuleDict(
        {
            "conv": nn.Conv3d(1, 2, 1),
            "up": nn.ConvTranspose1d(1, 2, 1),
            "dense": nn.Linear(2, 2),
            "norm": nn.BatchNorm1d(2),
            "layer": nn.LayerNorm(2),
            "embedding": nn.Embedding(2, 2),
        }
    )
    decayed = {segment.name for segment in parameter_segments(module) if segment.decayed}
    assert decayed == {"conv.weight", "up.weight", "dense.weight"}
    assert not any(segment.decayed for segment in statistic_segments(module))


def test_a_tied_kernel_decays_under_its_first_name() -> None:
    decayed = {segment.name: segment.decayed for segment in parameter_segments(Tied())}
    assert decayed == {
        "embedding.weight": True,
        "scale": False,
        "empty": False,
        "dense.bias": False,
    }


def test_frozen_parameters_have_no_segment() -> None:
    module = nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    assert [segment.name for segment in parameter_segments(module)] == ["weight"]


# Flattening


@settings(deadline=None)
@given(module=modules)
def test_flattening_keeps_state_identity_and_views(module: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    identities = [id(p) for p in module.parameters()] + [id(b) for b in module.buffers()]
    flat = FlatModule(module)
    assert flat.module is module
    assert flat.parameter_segments == parameter_segments(module)
    assert flat.statistic_segments == statistic_segments(module)
    assert [id(p) for p in module.parameters()] + [id(b) for b in module.buffers()] == identities
    assert_same_state(module.state_dict(), before)
    assert not flat.gradients.any()
    assert not padding_of(flat.parameters, flat.parameter_segments).any()
    assert not padding_of(flat.statistics, flat.statistic_segments).any()
    flat.check_views()


def test_flat_vectors_are_float32_and_the_module_reads_and_writes_them() -> None:
    model = small_xception()
    flat = FlatModule(model)
    vectors = {"parameters": flat.parameters, "gradients": flat.gradients}
    for vector in (*vectors.values(), flat.statistics):
        assert vector.dtype == torch.float32
        assert vector.is_contiguous()
        assert not vector.requires_grad
    flat.parameters.fill_(2)
    flat.gradients.fill_(3)
    flat.statistics.fill_(4)
    for parameter in model.parameters():
        assert (parameter == 2).all()
        assert parameter.grad is not None
        assert (parameter.grad == 3).all()
    assert all((b == 4).all() for b in model.buffers() if b.is_floating_point())


def test_buffers_outside_the_flat_vector_stay_where_they_are() -> None:
    module = Tied()
    addresses = module.scratch.data_ptr(), module.calls.data_ptr()
    flat = FlatModule(module)
    assert [segment.name for segment in flat.statistic_segments] == ["ema"]
    assert (module.scratch.data_ptr(), module.calls.data_ptr()) == addresses


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_flat_module_computes_what_an_untouched_copy_does(
    training: bool, channels_last: bool
) -> None:
    model = small_xception().train(training)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    untouched = copy.deepcopy(model)
    flat = FlatModule(model)
    images = torch.randn(4, 3, 40, 52)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    outputs = [module(images) for module in (model, untouched)]
    for output in outputs:
        output.square().sum().backward()

    assert torch.equal(*outputs)
    gradients = named_views(flat.gradients, flat.parameter_segments)
    for name, parameter in untouched.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any(), name
        assert torch.equal(gradients[name], parameter.grad), name
    statistics = named_views(flat.statistics, flat.statistic_segments)
    for name, buffer in untouched.named_buffers():
        if buffer.is_floating_point():
            assert torch.equal(statistics[name], buffer), name
    assert_same_state(model.state_dict(), untouched.state_dict())
    flat.check_views()


def test_backward_passes_add_up_in_the_flat_vector() -> None:
    flat = FlatModule(small_xception().eval())
    images = torch.randn(2, 3, 40, 40)
    address = flat.gradients.data_ptr()

    def add_gradient() -> Tensor:
        flat.module(images).square().sum().backward()
        return flat.gradients.clone()

    once = add_gradient()
    assert once.any()
    assert torch.equal(add_gradient(), once + once)
    flat.zero_gradients()
    assert not flat.gradients.any()
    assert torch.equal(add_gradient(), once)
    assert flat.gradients.data_ptr() == address
    flat.check_views()


def test_tied_and_unreached_parameters() -> None:
    module = Tied()
    untouched = copy.deepcopy(module)
    flat = FlatModule(module)
    ids = torch.tensor([1, 3, 3])
    for each in (module, untouched):
        each(ids).square().sum().backward()
    views = named_views(flat.gradients, flat.parameter_segments)
    assert module.dense.weight is module.embedding.weight
    torch.testing.assert_close(views["embedding.weight"], untouched.embedding.weight.grad)
    assert untouched.empty.grad is None
    assert module.empty.grad is not None


def test_padding_stays_zero_through_training() -> None:
    flat = FlatModule(small_xception())
    assert padding_of(flat.parameters, flat.parameter_segments).numel() > 0
    optimizer = torch.optim.SGD(flat.module.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        flat.module(torch.randn(2, 3, 40, 40)).square().sum().backward()
        optimizer.step()
    for vector, segments in (
        (flat.parameters, flat.parameter_segments),
        (flat.gradients, flat.parameter_segments),
        (flat.statistics, flat.statistic_segments),
    ):
        assert not padding_of(vector, segments).any()
    flat.check_views()


def test_loading_a_state_dict_fills_the_flat_vectors() -> None:
    source, target = FlatModule(small_xception()), FlatModule(small_xception())
    source.parameters.add_(1)
    source.statistics.add_(1)
    target.module.load_state_dict(source.module.state_dict())
    target.check_views()
    for name, parameter in source.module.named_parameters():
        view = named_views(target.parameters, target.parameter_segments)[name]
        assert torch.equal(view, parameter)
    statistics = [named_views(f.statistics, f.statistic_segments) for f in (source, target)]
    assert all(torch.equal(statistics[0][name], statistics[1][name]) for name in statistics[0])


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


def test_a_module_without_parameters_has_empty_vectors() -> None:
    flat = FlatModule(nn.ReLU())
    flat.check_views()
    flat.zero_gradients()
    assert (flat.parameters.numel(), flat.statistics.numel()) == (0, 0)


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
