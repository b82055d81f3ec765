"""What of Xception can be varied: figures 9 and 10, and the spectrum between convolutions."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from model.cost import measure_cost
from model.errors import InputError
from model.flat import FlatModule
from model.registry import check_settings, create_model
from model.separable import SeparableConv2d
from model.spectrum import SpectrumConv2d
from model.xception import Xception, XceptionSettings, scaled_channels

ACTIVATIONS = ("none", "relu", "elu")
ORDERS = ("spatial_first", "pointwise_first")

variants = st.fixed_dictionaries(
    {
        "width": st.sampled_from([0.05, 0.3, 0.5, 1.0, 1.5, 2.0]),
        "middle_blocks": st.integers(0, 9),
        "residual": st.booleans(),
        "separable_activation": st.sampled_from(ACTIVATIONS),
        "separable_order": st.sampled_from(ORDERS),
        "segments": st.sampled_from([1, 2, 4, 8, "depthwise"]),
    }
)


def on_meta(num_classes: int, **options: Any) -> Xception:
    with torch.device("meta"):
        return Xception(XceptionSettings(**options), num_classes)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(seed: int = 0, **options: Any) -> Xception:
    torch.manual_seed(seed)
    return Xception(XceptionSettings(**{"width": 0.05, "middle_blocks": 1, **options}), 5)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)


# Counts


def counted(num_classes: int, variant: dict[str, Any]) -> int:
    """The parameters of figure 5, layer by layer, from its channels."""
    c32, c64, c128, c256, c728, c1024, c1536, c2048 = (
        scaled_channels(count, variant["width"])
        for count in (32, 64, 128, 256, 728, 1024, 1536, 2048)
    )
    blocks = [(c64, c128, c128), (c128, c256, c256), (c256, c728, c728), (c728, c728, c1024)]
    separable = [pair for taken, mid, made in blocks for pair in ((taken, mid), (mid, made))]
    separable += [(c728, c728)] * 3 * variant["middle_blocks"] + [(c1024, c1536), (c1536, c2048)]
    total = 3 * 9 * c32 + 2 * c32 + c32 * 9 * c64 + 2 * c64
    for taken, made in separable:
        worked_on = taken if variant["separable_order"] == "spatial_first" else made
        segments = worked_on if variant["segments"] == "depthwise" else variant["segments"]
        total += 9 * worked_on * worked_on // segments + taken * made + 2 * made
    if variant["residual"]:
        total += sum(taken * made + 2 * made for taken, _, made in blocks)
    return total + (c2048 + 1) * num_classes


@settings(max_examples=40, deadline=None)
@given(variant=variants, num_classes=st.integers(1, 2000))
def test_counts_follow_from_the_channels(variant: dict[str, Any], num_classes: int) -> None:
    assert num_parameters(on_meta(num_classes, **variant)) == counted(num_classes, variant)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ({}, 22_855_952),
        # Less the four projections: 64 x 128, 128 x 256, 256 x 728, 728 x 1024, and their BN.
        ({"residual": False}, 22_855_952 - 972_800 - 4_272),
        ({"segments": 8}, 42_769_568),
        ({"segments": 4}, 62_890_616),
        ({"segments": 2}, 103_132_712),
        ({"segments": 1}, 183_616_904),
        ({"separable_order": "pointwise_first"}, 22_873_808),
        ({"separable_order": "pointwise_first", "segments": 1}, 221_328_776),
        ({"separable_activation": "elu"}, 22_855_952),
    ],
)
def test_counts_at_full_size(variant: dict[str, Any], expected: int) -> None:
    assert num_parameters(on_meta(1000, **variant)) == expected


# Residual connections


def test_without_residuals_only_the_projections_go() -> None:
    names, plain = (
        list(on_meta(3, middle_blocks=1, residual=residual).state_dict())
        for residual in (True, False)
    )
    assert plain == [name for name in names if "shortcut" not in name]
    assert len(plain) < len(names)


@pytest.mark.parametrize("residual", [True, False])
def test_a_block_leaves_the_maps_alone_that_it_is_given(residual: bool) -> None:
    model = small(residual=residual).eval()
    taken: list[tuple[Tensor, Tensor]] = []
    for number in range(1, model.num_blocks + 1):
        model.get_submodule(f"block{number}").register_forward_pre_hook(
            lambda _block, inputs: taken.append((inputs[0], inputs[0].clone()))
        )
    with torch.no_grad():
        model(torch.randn(2, 3, 48, 48))
    assert len(taken) == model.num_blocks
    assert all(torch.equal(maps, before) for maps, before in taken)


# Separable layers


@pytest.mark.parametrize(
    ("order", "layer"), [("spatial_first", SeparableConv2d), ("pointwise_first", SpectrumConv2d)]
)
def test_the_order_chooses_the_class_of_all_34_layers(order: str, layer: type[nn.Module]) -> None:
    model = on_meta(3, separable_order=order)
    layers = [m for m in model.modules() if isinstance(m, SeparableConv2d | SpectrumConv2d)]
    assert len(layers) == 34
    assert {type(layer) for layer in layers} == {layer}


def test_depthwise_is_the_default_and_the_far_end_of_the_numbers() -> None:
    # At this width every separable layer has 8 channels.
    default, named, counted_out = (
        small(width=0.005, **options)
        for options in ({}, {"segments": "depthwise"}, {"segments": 8})
    )
    assert same_state(default, named)
    assert same_state(default, counted_out)
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(default(images), named(images))
    assert torch.equal(default(images), counted_out(images))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_an_activation_keeps_nothing_more_for_the_backward_pass(
    order: str, activation: str
) -> None:
    def kept(name: str) -> int:
        options = {"separable_order": order, "separable_activation": name, "middle_blocks": 1}
        return measure_cost(lambda: on_meta(3, **options), image_size=71).num_activation_bytes

    assert kept(activation) == kept("none")


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("order", "segments"), list(itertools.product(ORDERS, (1, 2, 8, "depthwise")))
)
def test_gradients_reach_every_parameter_of_every_variant_in_its_flat_vector(
    residual: bool, activation: str, order: str, segments: int | str
) -> None:
    model = small(
        residual=residual,
        separable_activation=activation,
        separable_order=order,
        segments=segments,
        fc_widths=(16,),
        dropout=0.1,
    )
    flat = FlatModule(model)
    logits = model(torch.randn(4, 3, 48, 48))
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    flat.check_views()
    assert flat.gradients.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name


# Values that cannot be used


def channels_worked_on(width: float, order: str) -> set[int]:
    """Of the 3x3 convolutions in separable layers, as the model has them."""
    model = on_meta(1, width=width, separable_order=order, middle_blocks=1)
    return {
        part.groups
        for name, part in model.named_modules()
        if ".sep" in name and isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3)
    }


@settings(max_examples=25, deadline=None)
@given(
    width=st.sampled_from([0.005, 0.05, 0.1, 0.37, 0.5, 1.0, 1.3, 2.0, 4.0]),
    order=st.sampled_from(ORDERS),
    segments=st.one_of(st.integers(1, 40), st.integers(41, 4000)),
)
def test_segments_either_fit_every_layer_or_are_answered_with_those_that_do(
    width: float, order: str, segments: int
) -> None:
    channels = channels_worked_on(width, order)
    fitting = [n for n in range(1, max(channels) + 1) if all(c % n == 0 for c in channels)]
    typed = {"width": width, "separable_order": order, "segments": str(segments)}
    if segments in fitting:
        assert check_settings("xception", typed) == XceptionSettings(
            **{**typed, "segments": segments}
        )
        return
    with pytest.raises(InputError) as caught:
        check_settings("xception", typed)
    first = next(count for count in sorted(channels) if count % segments)
    assert str(caught.value) == (
        f"setting segments = '{segments}' of model 'xception' cannot be used:"
        f" input does not divide the {first} channels of a layer:"
        f' at this width, choose {", ".join(map(str, fitting))} or "depthwise"'
    )


@pytest.mark.parametrize("segments", [0, -2, 1.5, "0", "many", "1.5", None, [2]])
def test_what_is_no_number_of_segments_is_answered_with_what_is(segments: Any) -> None:
    with pytest.raises(InputError) as caught:
        create_model("xception", 3, segments=segments)
    assert str(caught.value) == (
        f"setting segments = {segments!r} of model 'xception' cannot be used:"
        ' input should be a whole number of at least 1, or "depthwise"'
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"width": -1, "segments": 3}, "width"),
        ({"separable_order": "sideways", "segments": 3}, "separable_order"),
    ],
)
def test_segments_are_not_blamed_for_another_setting(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        XceptionSettings(**options)
    assert [error["loc"] for error in caught.value.errors()] == [(named,)]


@pytest.mark.parametrize(
    "bad", [{"separable_activation": "gelu"}, {"separable_order": "none"}, {"residual": "maybe"}]
)
def test_other_values_are_refused_by_name(bad: dict[str, str]) -> None:
    [(name, value)] = bad.items()
    with pytest.raises(InputError, match=f"setting {name} = '{value}' "):
        create_model("xception", 3, **bad)


def test_values_from_a_command_line_are_parsed() -> None:
    typed = {"segments": "4", "residual": "false", "separable_activation": "elu"}
    checked = check_settings("xception", typed)
    assert checked == XceptionSettings(segments=4, residual=False, separable_activation="elu")
    assert checked == XceptionSettings(**checked.model_dump())
