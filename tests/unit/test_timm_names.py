"""timm's names, stated anew from its `legacy_xception` (timm 1.0.31), and what they compute."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import InputError
from model.inception_v3 import InceptionV3Settings
from model.timm_names import TIMM_NOTE, timm_tensors
from model.xception import Xception, XceptionSettings

NUM_CLASSES = 10
SIZES = (71, 72)
"""Pixels: sides at which every pool meets maps of odd size, where its padding is like timm's."""

BLOCKS = {
    1: (64, 128, 128),
    2: (128, 256, 256),
    3: (256, 728, 728),
    **dict.fromkeys(range(4, 12), (728, 728, 728, 728)),
    12: (728, 728, 1024),
}
"""By timm's number: channels before, between and after the block's separable convolutions."""

OTHERS = [
    ("width", 0.5),
    ("middle_blocks", 7),
    ("fc_widths", (16,)),
    ("residual", False),
    ("separable_activation", "relu"),
    ("separable_order", "pointwise_first"),
    ("segments", 4),
]
"""A value of each setting that timm's model has no counterpart for."""


def batch_norm(name: str, num_channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{tensor}", (num_channels,)
    yield f"{name}.num_batches_tracked", ()


def separable(name: str, before: int, after: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.conv1.weight", (before, 1, 3, 3)
    yield f"{name}.pointwise.weight", (after, before, 1, 1)


def expected() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of timm's state dict."""
    for number, before, after in ((1, 3, 32), (2, 32, 64)):
        yield f"conv{number}.weight", (after, before, 3, 3)
        yield from batch_norm(f"bn{number}", after)
    for block, channels in BLOCKS.items():
        if channels[0] != channels[-1] or block < 4:
            yield f"block{block}.skip.weight", (channels[-1], channels[0], 1, 1)
            yield from batch_norm(f"block{block}.skipbn", channels[-1])
        for index, before, after in steps(block):
            yield from separable(f"block{block}.rep.{index}", before, after)
            yield from batch_norm(f"block{block}.rep.{index + 1}", after)
    for number, before, after in ((3, 1024, 1536), (4, 1536, 2048)):
        yield from separable(f"conv{number}", before, after)
        yield from batch_norm(f"bn{number}", after)
    yield "fc.weight", (NUM_CLASSES, 2048)
    yield "fc.bias", (NUM_CLASSES,)


def steps(block: int) -> Iterator[tuple[int, int, int]]:
    """Index in `rep`, channels before and after, of each separable convolution of a block."""
    channels = BLOCKS[block]
    for position, (before, after) in enumerate(pairwise(channels)):
        yield 3 * position + (block != 1), before, after


def timm_logits(state: dict[str, Tensor], images: Tensor, eps: float) -> Tensor:
    """What timm's module computes of its tensors, with its symmetric padding of the pools."""

    def norm(name: str, maps: Tensor) -> Tensor:
        tensors = (state[f"{name}.{each}"] for each in ("running_mean", "running_var"))
        return F.batch_norm(maps, *tensors, state[f"{name}.weight"], state[f"{name}.bias"], eps=eps)

    def separate(name: str, maps: Tensor) -> Tensor:
        depthwise = state[f"{name}.conv1.weight"]
        maps = F.conv2d(maps, depthwise, padding=1, groups=len(depthwise))
        return F.conv2d(maps, state[f"{name}.pointwise.weight"])

    maps = F.relu(norm("bn1", F.conv2d(images, state["conv1.weight"], stride=2)))
    maps = F.relu(norm("bn2", F.conv2d(maps, state["conv2.weight"])))
    for block in BLOCKS:
        shortcut, name = maps, f"block{block}"
        for index, _, _ in steps(block):
            maps = F.relu(maps) if index else maps
            maps = norm(f"{name}.rep.{index + 1}", separate(f"{name}.rep.{index}", maps))
        if f"{name}.skip.weight" in state:
            shortcut = F.conv2d(shortcut, state[f"{name}.skip.weight"], stride=2)
            shortcut = norm(f"{name}.skipbn", shortcut)
            maps = F.max_pool2d(maps, 3, 2, padding=1)
        maps = maps + shortcut
    for number in (3, 4):
        maps = F.relu(norm(f"bn{number}", separate(f"conv{number}", maps)))
    return F.linear(maps.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.fixture(scope="module")
def model() -> Xception:
    """With BN as far from its initial values as after training, and maps that stay in range."""
    torch.manual_seed(0)
    model = Xception(XceptionSettings(), NUM_CLASSES)
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
        model.train()(torch.randn(8, 3, 71, 71))
    return model.eval()


def test_names_and_shapes_are_timms(model):
    tensors = timm_tensors(model.state_dict(), XceptionSettings())
    assert {name: tuple(t.shape) for name, t in tensors.items()} == dict(expected())
    assert len(tensors) == len(model.state_dict())


@pytest.mark.parametrize("size", SIZES)
def test_timm_computes_the_same_logits_of_them(model, size):
    images = torch.randn(2, 3, size, size)
    tensors = timm_tensors(model.state_dict(), XceptionSettings())
    with torch.inference_mode():
        ours, theirs = model(images), timm_logits(tensors, images, eps=1e-3)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (ours[0] - ours[1]).abs().max() > 0.01, "the logits must depend on the images"


def test_the_note_names_what_it_takes(model):
    assert "\n" not in TIMM_NOTE
    assert all(size % 32 in (7, 8) for size in SIZES)
    tensors = timm_tensors(model.state_dict(), XceptionSettings())
    with torch.inference_mode():
        for size, eps in ((71, 1e-5), (73, 1e-3)):
            images = torch.randn(1, 3, size, size)
            difference = model(images) - timm_logits(tensors, images, eps)
            assert difference.abs().max() > 1e-2, (size, eps)


def test_dropout_is_no_obstacle():
    with torch.device("meta"):
        state = Xception(XceptionSettings(), 3).state_dict()
    assert len(timm_tensors(state, XceptionSettings(dropout=0.5))) == len(state)


@pytest.mark.parametrize(("setting", "value"), OTHERS)
def test_another_structure_is_refused_by_its_setting(setting, value):
    settings = XceptionSettings(**{setting: value})
    with torch.device("meta"):
        state = Xception(settings, 3).state_dict()
    with pytest.raises(InputError, match=rf"^model\.{setting} = .* legacy_xception"):
        timm_tensors(state, settings)


def test_settings_that_do_not_tell_the_truth_are_found_out():
    with torch.device("meta"):
        state = Xception(XceptionSettings(middle_blocks=7), 3).state_dict()
    with pytest.raises(InputError, match="no place for these tensors"):
        timm_tensors(state, XceptionSettings())
    with pytest.raises(InputError, match="the model is none"):
        timm_tensors(state, InceptionV3Settings())


def test_every_setting_but_dropout_is_tried_above():
    assert set(XceptionSettings.model_fields) == {"dropout", *(name for name, _ in OTHERS)}
