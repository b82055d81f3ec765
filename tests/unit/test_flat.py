"""Flat vectors against an untouched copy of the module, and the layout's own laws."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from flat_modules import Tied, assert_same_state, modules, padding_of, small_xception, stack, stacks
from hypothesis import given, settings
from torch import Tensor, nn

from model.flat import (
    ALIGNMENT,
    FlatModule,
    Segment,
    flat_numel,
    named_views,
    parameter_segments,
    statistic_segments,
)
from model.registry import create_model

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


def test_a_module_without_parameters_has_empty_vectors() -> None:
    flat = FlatModule(nn.ReLU())
    flat.check_views()
    flat.zero_gradients()
    assert (flat.parameters.numel(), flat.statistics.numel()) == (0, 0)
