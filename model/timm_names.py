"""Xception's tensors under the names of timm's `legacy_xception`.

timm's module goes back to Cadene's pretrainedmodels: the stem and the last block lie at the top
level, a block's layers are counted in one `rep`, and its block 1 is the paper's block 2.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.errors import InputError
from model.settings import Settings
from model.xception import Xception, XceptionSettings

TIMM_NOTE = (
    "timm's legacy_xception loads these by name, but sets BN's eps to 1e-5 and pads its pools alike"
    " on both sides: for this model's logits set eps = 1e-3 in each BatchNorm2d, and take sides of"
    " 32k + 7 or 32k + 8 pixels"
)
"""What a user of such a file must know. At other sides some pool meets a map of even size."""

_INERT = {"dropout"}
"""Settings that an exported model may have: they change neither tensors nor evaluation."""


def timm_tensors(state: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """An Xception's state dict under timm's names, sharing its memory.

    Raises InputError unless the settings are those of the paper's model without FC layers, the
    one structure that timm has, and the tensors are that model's.
    """
    _check_settings(settings)
    with torch.device("meta"):
        plain = Xception(XceptionSettings(), _num_classes(state)).state_dict()
    if _shapes(state) != _shapes(plain):
        raise InputError(
            "timm's legacy_xception has no place for these tensors, which are not the default"
            " Xception's: choose another format"
        )
    return {_timm_name(name): tensor for name, tensor in state.items()}


def _check_settings(settings: Settings) -> None:
    if not isinstance(settings, XceptionSettings):
        raise InputError("timm's legacy_xception is an xception, and the model is none")
    for name, value in settings:
        default = getattr(XceptionSettings(), name)
        if name not in _INERT and value != default:
            raise InputError(
                f"model.{name} = {value!r} has no counterpart in timm's legacy_xception, which is"
                f" the model with {name} = {default!r}: choose another format"
            )


def _num_classes(state: Mapping[str, Tensor]) -> int:
    bias = state.get("head.dense.bias")
    return bias.numel() if bias is not None else 1


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _timm_name(name: str) -> str:
    block, part, *rest = name.split(".")
    if block == "head":
        return ".".join(("fc", *rest))
    # timm's names for the two convolutions of a separable layer.
    rest = ["conv1" if each == "depthwise" else each for each in rest]
    return ".".join((*_place(int(block.removeprefix("block")), part, rest), rest[-1]))


def _place(block: int, part: str, rest: list[str]) -> tuple[str, ...]:
    """Where timm keeps a layer of a block; `rest` leads on to the tensor within the layer."""
    inner = tuple(rest[:-1])
    if block == 1:
        return (part, *inner)
    if part == "shortcut":
        return f"block{block - 1}", {"conv": "skip", "bn": "skipbn"}[inner[0]]
    kind, number = part[:-1], int(part[-1])  # sep1, bn1, sep2 and so on
    if block == 14:
        return f"{'conv' if kind == 'sep' else 'bn'}{number + 2}", *inner
    # ReLU, separable convolution and BN take a number each; block 2 lacks the first ReLU.
    index = 3 * (number - 1) + (block > 2) + (kind == "bn")
    return f"block{block - 1}", "rep", str(index), *inner
