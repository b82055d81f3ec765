"""Weights that Keras trained, in our models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.errors import InputError
from model.keras_layers import KerasWeight, keras_layers


def load_keras_weights(module: nn.Module, arrays: Sequence[NDArray[Any]]) -> None:
    """Copy what Keras's `get_weights()` gives into the module's parameters and statistics.

    arrays: float arrays in Keras's order and axes: kernels HWIO, depthwise ones HWC1, dense ones
    IO; batch norm's gamma where the model has one, beta, mean, variance. They are of the whole
    model, dense layer included, and are converted to the module's dtypes and devices.

    Everything is checked before the first value changes.

    Raises InputError for a model that Keras has not, for too few or too many arrays, or, naming
    the first that does not fit, for a wrong shape or dtype.
    """
    weights = [weight for layer in keras_layers(module) for weight in layer.weights]
    _check_count(module, weights, arrays)
    for index, (weight, array) in enumerate(zip(weights, arrays, strict=True)):
        _check(index, weight, array)
    with torch.no_grad():
        for weight, array in zip(weights, arrays, strict=True):
            assert not weight.tensor.is_meta, "a module on the meta device has nothing to load into"
            weight.tensor.copy_(_as_tensor(array, weight.tensor.dtype).permute(weight.axes))


def _check_count(
    module: nn.Module, weights: Sequence[KerasWeight], arrays: Sequence[NDArray[Any]]
) -> None:
    missing = len(weights) - len(arrays)
    if missing:
        mend = "whole model, with include_top=True" if missing == 2 else "same model"
        raise InputError(
            f"{len(arrays)} arrays are not the weights of {type(module).__name__}, of which Keras"
            f" has {len(weights)}: give those of the {mend}"
        )


def _check(index: int, weight: KerasWeight, array: NDArray[Any]) -> None:
    place = f"array {index} of shape {tuple(array.shape)}"
    if tuple(array.shape) != weight.keras_shape:
        raise InputError(
            f"{place} does not fit {weight.name} of shape {tuple(weight.tensor.shape)}, which takes"
            f" {weight.keras_shape} from Keras: give the weights of the same model and settings"
        )
    if array.dtype.kind != "f":
        raise InputError(
            f"{place} for {weight.name} holds {array.dtype}, not floating point numbers:"
            " give what get_weights() gives"
        )


def _as_tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """A copy in the machine's byte order, which torch asks for."""
    wide = dtype == torch.float64
    return torch.from_numpy(np.array(array, dtype=np.float64 if wide else np.float32))
