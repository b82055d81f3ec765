"""Weight files as Keras writes them, `.h5` and `.weights.h5`, without Keras."""

from pathlib import Path
from typing import Any, NoReturn

import h5py  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from torch import nn

from model.errors import InputError
from model.keras_layers import KerasLayer, keras_layers

_LAYER_NAMES = "layer_names"
_WEIGHT_NAMES = "weight_names"


def read_keras_weights(path: str | Path, module: nn.Module) -> list[NDArray[Any]]:
    """A file's arrays in the order of `get_weights()`, for `load_keras_weights`.

    Reads the `.h5` files of every Keras up to now, of weights or of a whole model, and the
    `.weights.h5` of Keras 3. The latter doesn't say in which order its layers are, so it takes
    the order of `module`; one on the meta device, with any number of classes, will do: the
    length of the last array is the file's number of classes.

    Raises InputError for a file that can't be read, isn't HDF5, or has neither layout, for a
    `.weights.h5` with other layers than the module's, and for a module that Keras has not.
    """
    layers = keras_layers(module)
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise InputError(f"{path} is not there: give the path of a Keras weights file") from None
    except OSError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} can't be read as HDF5 ({reason}): give a .h5 or .weights.h5 file, which"
            " model.save_weights(...) writes in Keras; a .keras file is neither"
        ) from None
    with file:
        return _read(path, file, layers)


def _read(path: str | Path, file: h5py.File, layers: list[KerasLayer]) -> list[NDArray[Any]]:
    legacy = file.get("model_weights", file)
    if _has_names(legacy, _LAYER_NAMES):
        return _read_legacy(path, legacy)
    if "layers" in file:
        return _read_keras3(path, _group(path, file, "layers"), layers)
    raise InputError(
        f"{path} has neither layer_names nor layers, so it isn't one of Keras's weight files:"
        " write it with model.save_weights(...)"
    )


def _read_legacy(path: str | Path, group: h5py.Group) -> list[NDArray[Any]]:
    """The layout up to Keras 2: attributes hold the names of layers and weights, in order."""
    return [
        _array(path, group, f"{layer}/{weight}")
        for layer in _names(group, _LAYER_NAMES)
        for weight in _names(_group(path, group, layer), _WEIGHT_NAMES)
    ]


def _read_keras3(
    path: str | Path, group: h5py.Group, layers: list[KerasLayer]
) -> list[NDArray[Any]]:
    """The layout of Keras 3: each class's layers are counted, in the order of `model.layers`."""
    arrays = []
    counts: dict[str, int] = {}
    for layer in layers:
        name = _counted(layer.kind, counts.get(layer.kind, 0))
        counts[layer.kind] = counts.get(layer.kind, 0) + 1
        variables = _group(path, group, f"{name}/vars")
        if len(variables) != len(layer.weights):
            _refuse(path, f"layers/{name} has {len(variables)} weights, not {len(layer.weights)}")
        arrays += [_array(path, variables, str(index)) for index in range(len(variables))]
    for kind, count in counts.items():
        if _counted(kind, count) in group:
            _refuse(path, f"it has layers/{_counted(kind, count)}, one too many")
    return arrays


def _counted(kind: str, index: int) -> str:
    return f"{kind}_{index}" if index else kind


def _has_names(group: h5py.Group, attribute: str) -> bool:
    return attribute in group.attrs or f"{attribute}0" in group.attrs


def _names(group: h5py.Group, attribute: str) -> list[str]:
    """An attribute's names, or those of its numbered parts: HDF5 limits an attribute's size."""
    if attribute in group.attrs:
        parts = [group.attrs[attribute]]
    else:
        parts = []
        while f"{attribute}{len(parts)}" in group.attrs:
            parts.append(group.attrs[f"{attribute}{len(parts)}"])
    return [name.decode() if isinstance(name, bytes) else str(name) for p in parts for name in p]


def _group(path: str | Path, group: h5py.Group, name: str) -> h5py.Group:
    found = group.get(name)
    if not isinstance(found, h5py.Group):
        _refuse(path, f"it has no group {group.name.rstrip('/')}/{name}")
    return found


def _array(path: str | Path, group: h5py.Group, name: str) -> NDArray[Any]:
    found = group.get(name)
    if not isinstance(found, h5py.Dataset):
        _refuse(path, f"it has no array {group.name.rstrip('/')}/{name}")
    return np.asarray(found)


def _refuse(path: str | Path, complaint: str) -> NoReturn:
    raise InputError(
        f"{path} is damaged or of another model: {complaint}; choose the model that wrote it"
    )
