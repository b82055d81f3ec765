"""Keras's files, written without Keras: what is read, and what is refused."""

import zipfile
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from keras_arrays import (
    NUM_CLASSES,
    SMALL,
    Arrays,
    complaint,
    inception_v3,
    on_meta,
    random_arrays,
    small,
)
from torch import nn

from model.keras_files import read_keras_weights
from model.keras_layers import KerasLayer, keras_layers
from model.keras_weights import load_keras_weights
from model.xception import Xception, XceptionSettings


@pytest.fixture
def arrays() -> Arrays:
    return random_arrays(keras_layers(small()))


def write_legacy(
    group: h5py.Group, layers: Sequence[KerasLayer], arrays: Arrays, chunk: int | None = None
) -> None:
    """As Keras 1 and 2 did: layers and weights under any names, in the order of attributes.

    chunk: layers an attribute holds; Keras splits long ones.
    """
    order = [b"input", *(f"layer{len(layers) - i}".encode() for i in range(len(layers)))]
    if chunk is None:
        group.attrs["layer_names"] = order
    else:
        for number, start in enumerate(range(0, len(order), chunk)):
            group.attrs[f"layer_names{number}"] = order[start : start + chunk]
    group.create_group("input").attrs["weight_names"] = np.array([], dtype="S1")
    remaining = iter(arrays)
    for name, layer in zip(order[1:], layers, strict=True):
        inner = group.create_group(name)
        weights = [
            f"{name.decode()}/w{len(layer.weights) - i}:0".encode()
            for i, _ in enumerate(layer.weights)
        ]
        inner.attrs["weight_names"] = weights
        for weight in weights:
            inner[weight] = next(remaining)


def write_keras3(file: h5py.File, layers: Sequence[KerasLayer], arrays: Arrays) -> None:
    """As Keras 3 does: layers counted by class, and those without weights there as well."""
    counts: dict[str, int] = {}
    remaining = iter(arrays)
    for layer in layers:
        index = counts.setdefault(layer.kind, 0)
        counts[layer.kind] += 1
        name = layer.kind + (f"_{index}" if index else "")
        variables = file.create_group(f"layers/{name}/vars")
        for number, _ in enumerate(layer.weights):
            variables[str(number)] = next(remaining)
    file.create_group("layers/activation/vars")
    file.create_group("vars")


def whole_model(file: h5py.File, layers: Sequence[KerasLayer], arrays: Arrays) -> None:
    write_legacy(file.create_group("model_weights"), layers, arrays)
    file.create_group("optimizer_weights")


def chunked(file: h5py.File, layers: Sequence[KerasLayer], arrays: Arrays) -> None:
    write_legacy(file, layers, arrays, chunk=7)


@pytest.mark.parametrize("write", [write_legacy, chunked, whole_model, write_keras3])
def test_files_give_the_arrays_in_order(
    arrays: Arrays, tmp_path: Path, write: Callable[..., None]
) -> None:
    module = small()
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        write(file, keras_layers(module), arrays)
    with torch.device("meta"):
        other_classes = Xception(SMALL, 1)
    read = read_keras_weights(tmp_path / "weights.h5", other_classes)
    assert len(read) == len(arrays)
    assert all(np.array_equal(*both) for both in zip(read, arrays, strict=True))
    load_keras_weights(module, read)


def test_layers_of_a_kind_are_counted_as_numbers(tmp_path: Path) -> None:
    """`conv2d_10` comes after `conv2d_9`, in the interleaved order."""
    module = on_meta(inception_v3)
    layers = keras_layers(module)
    lengths = [len(layer.weights) for layer in layers]
    marks = [np.float32(index) for index in range(sum(lengths))]
    path = tmp_path / "marks.weights.h5"
    with h5py.File(path, "w") as file:
        write_keras3(file, layers, list(marks))
        starts = dict(zip(_group_names(layers), accumulate([0, *lengths[:-1]]), strict=True))
        assert file["layers/conv2d_10/vars/0"][()] == starts["conv2d_10"]
    assert read_keras_weights(path, module) == marks


def _group_names(layers: Sequence[KerasLayer]) -> list[str]:
    kinds = [layer.kind for layer in layers]
    indices = [kinds[:position].count(kind) for position, kind in enumerate(kinds)]
    return [kind + (f"_{i}" if i else "") for kind, i in zip(kinds, indices, strict=True)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: f.pop("layers/separable_conv2d_12"), "no group /layers/separable_conv2d_12/"),
        (lambda f: f.pop("layers/conv2d"), "no group /layers/conv2d/vars"),
        (lambda f: f.create_group("layers/conv2d_6"), "layers/conv2d_6, one too many"),
        (lambda f: f.pop("layers/conv2d/vars/0"), "layers/conv2d has 0 weights, not 1"),
        (lambda f: f.pop("layers/batch_normalization_3/vars/3"), "has 3 weights, not 4"),
        (
            lambda f: f.move("layers/dense/vars/0", "layers/dense/vars/a"),
            "no array /layers/dense/vars/0",
        ),
        (lambda f: f.pop("layers"), "neither layer_names nor layers"),
    ],
)
def test_files_of_keras_3_of_another_model_are_refused(
    arrays: Arrays, tmp_path: Path, change: Callable[[h5py.File], Any], expected: str
) -> None:
    path = tmp_path / "other.weights.h5"
    with h5py.File(path, "w") as file:
        write_keras3(file, keras_layers(small()), arrays)
        change(file)
    text = complaint(read_keras_weights, path, small())
    assert expected in text
    assert str(path) in text


@pytest.mark.parametrize("deleted", ["layer3", "layer3/layer3/w1:0"])
def test_damaged_legacy_files_are_refused(arrays: Arrays, tmp_path: Path, deleted: str) -> None:
    path = tmp_path / "damaged.h5"
    with h5py.File(path, "w") as file:
        write_legacy(file, keras_layers(small()), arrays)
        del file[deleted]
    assert f"/{deleted};" in complaint(read_keras_weights, path, small())


def test_legacy_files_of_another_model_are_refused_on_loading(tmp_path: Path) -> None:
    other = Xception(XceptionSettings(width=0.05, middle_blocks=2), NUM_CLASSES)
    layers = keras_layers(other)
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        write_legacy(file, layers, random_arrays(layers))
    read = read_keras_weights(path, small())
    assert "128 arrays are not the weights" in complaint(load_keras_weights, small(), read)


def write_text(path: Path) -> None:
    path.write_text("no weights")


def write_keras_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.weights.h5", b"")


def write_truncated(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["array"] = np.zeros(1000)
    path.write_bytes(path.read_bytes()[:3000])


def write_other_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["array"] = np.zeros(10)


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda path: None, "is not there"),
        (Path.mkdir, "can't be read as HDF5"),
        (Path.touch, "can't be read as HDF5"),
        (write_text, "can't be read as HDF5"),
        (write_keras_archive, "a .keras file is neither"),
        (write_truncated, "can't be read as HDF5"),
        (write_other_hdf5, "neither layer_names nor layers"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, write: Callable[[Path], Any], expected: str
) -> None:
    path = tmp_path / "model.weights.h5"
    write(path)
    text = complaint(read_keras_weights, path, small())
    assert expected in text
    assert str(path) in text


def test_a_model_that_keras_has_not_is_refused_before_its_file_is_looked_for() -> None:
    assert "Linear" in complaint(read_keras_weights, "nowhere.h5", nn.Linear(2, 3))
