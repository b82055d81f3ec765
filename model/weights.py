"""A model's weights from a safetensors file, by state dict name."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model.errors import InputError

LAST_LAYERS = ("head.dense.", "fc.", "classifier.6.")
"""Where the last layer stands: in this project's models, and in torchvision's ResNets and VGGs."""

_COUNTERS = "num_batches_tracked"
"""Of batch norm; nothing reads them where its momentum is fixed, and checkpoints leave them out."""


def load_weights(module: nn.Module, path: Path) -> tuple[str, ...]:
    """Copy a file's tensors into a module, in place, converting to its dtypes and device.

    Returns the names that keep their initial values: none, or those of the last layer if its
    shapes differ, as they do for another number of classes. Batch norm's counters may be missing.
    Everything is checked before the first element moves; on the meta device there is nothing to
    move, so a module built there learns whether a file fits.

    Raises InputError, naming the first culprit, for a file that can't be read, names that are
    missing or too many, or another shape or kind of numbers anywhere else.
    """
    tensors = _read(path)
    own = module.state_dict()
    left = _last_layer_if_other(own, tensors)
    _check(path, own, tensors, left)
    with torch.no_grad():
        for name, tensor in own.items():
            if name in tensors and name not in left:
                tensor.copy_(tensors[name])
    return left


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"weights {path} can't be read: {error}: name a .safetensors file, such as"
            " `asynception export` writes"
        ) from None


def _last_layer_if_other(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """The last layer's names if the file has them all, but some in another shape."""
    last = tuple(name for name in own if name.startswith(LAST_LAYERS))
    complete = all(name in tensors for name in last)
    other = complete and any(own[name].shape != tensors[name].shape for name in last)
    return last if other else ()


def _check(
    path: Path, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], left: Iterable[str]
) -> None:
    mend = "give the weights of a model with the same name and settings"
    for name, tensor in own.items():
        shape = tuple(tensor.shape)
        if name not in tensors:
            if not name.endswith(_COUNTERS):
                raise InputError(
                    f"weights {path} lack {name!r}, of which the model has one of shape {shape}:"
                    f" {mend}"
                )
            continue
        given = tensors[name]
        if tuple(given.shape) != shape and name not in left:
            raise InputError(
                f"weights {path} have {name!r} in shape {tuple(given.shape)}, and the model has it"
                f" in {shape}: {mend}"
            )
        if given.is_floating_point() != tensor.is_floating_point():
            raise InputError(
                f"weights {path} have {name!r} as {given.dtype}, and the model has it as"
                f" {tensor.dtype}: {mend}"
            )
    for name in tensors:
        if name not in own:
            raise InputError(f"weights {path} have {name!r}, which the model has not: {mend}")
