"""Keras's arrays and files, without Keras; `tests/integration/test_keras_parity.py` has it."""

import re
import zipfile
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from model.errors import InputError
from model.flat import FlatModule
from model.inception_v3 import (
    InceptionV3,
    InceptionV3Of2016,
    InceptionV3Of2016Settings,
    InceptionV3Settings,
)
from model.keras_files import read_keras_weights
from model.keras_layers import KerasLayer, keras_layers
from model.keras_weights import load_keras_weights
from model.resnet import ResNet152, ResNet152Settings
from model.vgg import VGG16, VGG16Settings
from model.xception import Xception, XceptionSettings

NUM_CLASSES = 5
SMALL = XceptionSettings(width=0.05, middle_blocks=1)

Arrays = list[np.ndarray]


def small() -> Xception:
    torch.manual_seed(0)
    return Xception(SMALL, NUM_CLASSES)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def inception_v3() -> InceptionV3:
    return InceptionV3(InceptionV3Settings(), NUM_CLASSES)


def inception_v3_2016() -> InceptionV3Of2016:
    return InceptionV3Of2016(InceptionV3Of2016Settings(), NUM_CLASSES)


def random_arrays(layers: Sequence[KerasLayer]) -> Arrays:
    random = np.random.default_rng(0)
    shapes = [weight.keras_shape for layer in layers for weight in layer.weights]
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.fixture
def arrays() -> Arrays:
    return random_arrays(keras_layers(small()))


def complaint(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


# The order of layers


def names(module: nn.Module) -> list[str]:
    return [weight.name for layer in keras_layers(module) for weight in layer.weights]


@pytest.mark.parametrize("build", [small, inception_v3, inception_v3_2016])
def test_every_tensor_has_one_place(build: Callable[[], nn.Module]) -> None:
    module = on_meta(build)
    listed = names(module)
    floats = [name for name, tensor in module.state_dict().items() if tensor.is_floating_point()]
    assert sorted(listed) == sorted(floats)
    assert listed[-2:] == ["head.dense.weight", "head.dense.bias"]


def test_the_order_of_a_block_of_xception() -> None:
    separable = [(f"sep{n}", ("depthwise.weight", "pointwise.weight"), f"bn{n}") for n in (1, 2)]
    norm = ("weight", "bias", "running_mean", "running_var")
    expected = []
    for sep, kernels, bn in (*separable, ("shortcut", ("conv.weight",), "shortcut.bn")):
        expected += [f"block3.{sep}.{kernel}" for kernel in kernels]
        expected += [f"block3.{bn}.{name}" for name in norm]
    listed = names(small())
    assert [name for name in listed if name.startswith("block3.")] == expected
    assert listed[:5] == ["block1.conv1.weight", *(f"block1.bn1.{name}" for name in norm)]


BLOCK_35 = (
    "branch3x3dbl.0.conv branch3x3dbl.0.bn branch5x5.0.conv branch3x3dbl.1.conv branch5x5.0.bn"
    " branch3x3dbl.1.bn branch1x1.0.conv branch5x5.1.conv branch3x3dbl.2.conv branch_pool.1.conv"
    " branch1x1.0.bn branch5x5.1.bn branch3x3dbl.2.bn branch_pool.1.bn"
)
BLOCK_8 = (
    "branch3x3dbl.0.conv branch3x3dbl.0.bn branch3x3.0.conv branch3x3dbl.1.conv branch3x3.0.bn"
    " branch3x3dbl.1.bn branch3x3.1.wide.conv branch3x3.1.high.conv branch3x3dbl.2.wide.conv"
    " branch3x3dbl.2.high.conv branch1x1.0.conv branch3x3.1.wide.bn branch3x3.1.high.bn"
    " branch3x3dbl.2.wide.bn branch3x3dbl.2.high.bn branch_pool.1.conv branch1x1.0.bn"
    " branch_pool.1.bn"
)


@pytest.mark.parametrize("build", [inception_v3, inception_v3_2016])
@pytest.mark.parametrize(("block", "order"), [("Mixed_5b", BLOCK_35), ("Mixed_7c", BLOCK_8)])
def test_the_order_of_blocks_of_inception(
    build: Callable[[], nn.Module], block: str, order: str
) -> None:
    """Read off `model.layers` of Keras 3.15's InceptionV3."""
    layers = [layer.weights[0].name.rpartition(".")[0] for layer in keras_layers(on_meta(build))]
    found = [name.removeprefix(f"{block}.") for name in layers if name.startswith(block)]
    assert found == order.split()


@pytest.mark.parametrize("build", [inception_v3, inception_v3_2016])
def test_parts_follow_one_another(build: Callable[[], nn.Module]) -> None:
    module = on_meta(build)
    parts = [name for name, part in module.named_children() if list(part.parameters())]
    listed = [name.partition(".")[0] for name in names(module)]
    assert listed == sorted(listed, key=parts.index)


def test_kinds_are_keras_s_classes() -> None:
    kinds = [layer.kind for layer in keras_layers(small())]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {
        "conv2d": 6,
        "batch_normalization": 19,
        "separable_conv2d": 13,
        "dense": 1,
    }


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: VGG16(VGG16Settings(), 3), "VGG16"),
        (lambda: ResNet152(ResNet152Settings(), 3), "ResNet152"),
        (lambda: nn.Linear(2, 3), "Linear"),
        (lambda: Xception(XceptionSettings(fc_widths=(8, 8)), 3), "fc_widths puts 2 layers"),
        (lambda: InceptionV3(InceptionV3Settings(fc_widths=(8,)), 3), "fc_widths puts 1 "),
        (
            lambda: Xception(XceptionSettings(separable_order="pointwise_first"), 3),
            'separable_order = "pointwise_first" ',
        ),
        (lambda: Xception(XceptionSettings(segments=2), 3), "segments = 2 "),
    ],
)
def test_models_that_keras_has_not_are_refused(
    build: Callable[[], nn.Module], expected: str
) -> None:
    assert expected in complaint(keras_layers, on_meta(build))


# Loading


def test_axes_are_turned(arrays: Arrays) -> None:
    module = small()
    load_keras_weights(module, arrays)
    loaded = iter(arrays)
    kernel = next(loaded)
    assert kernel.shape == (3, 3, 3, 8)
    np.testing.assert_array_equal(
        module.block1.conv1.weight.detach(), np.einsum("hwio->oihw", kernel)
    )
    sep, depthwise = module.block3.sep1, names(module).index("block3.sep1.depthwise.weight")
    assert arrays[depthwise].shape == (3, 3, 8, 1)
    np.testing.assert_array_equal(
        sep.depthwise.weight.detach(), np.einsum("hwco->cohw", arrays[depthwise])
    )
    np.testing.assert_array_equal(
        sep.pointwise.weight.detach(), np.einsum("hwio->oihw", arrays[depthwise + 1])
    )
    np.testing.assert_array_equal(module.head.dense.weight.detach(), arrays[-2].T)
    for vector, array in zip(
        (module.block1.bn1.weight, module.block1.bn1.bias), arrays[1:3], strict=True
    ):
        np.testing.assert_array_equal(vector.detach(), array)
    np.testing.assert_array_equal(module.block1.bn1.running_mean, arrays[3])
    np.testing.assert_array_equal(module.block1.bn1.running_var, arrays[4])


@pytest.mark.parametrize("build", [inception_v3, inception_v3_2016])
def test_all_arrays_arrive(build: Callable[[], nn.Module]) -> None:
    module = build()
    layers = keras_layers(module)
    arrays = random_arrays(layers)
    load_keras_weights(module, arrays)
    weights = [weight for layer in layers for weight in layer.weights]
    for weight, array in zip(weights, arrays, strict=True):
        axes = [weight.axes.index(axis) for axis in range(array.ndim)]
        found = module.state_dict()[weight.name].permute(axes)
        np.testing.assert_array_equal(found, array, err_msg=weight.name)


@pytest.mark.parametrize("dtype", ["<f8", ">f4", ">f8", "<f2"])
def test_other_floats_are_converted(arrays: Arrays, dtype: str) -> None:
    module = small()
    load_keras_weights(module, [array.astype(dtype) for array in arrays])
    assert module.head.dense.weight.dtype == torch.float32
    np.testing.assert_allclose(module.head.dense.bias.detach(), arrays[-1], rtol=1e-3)


def test_float64_modules_lose_no_digits(arrays: Arrays) -> None:
    module = small().double()
    wide = [array.astype(np.float64) + 1e-12 for array in arrays]
    load_keras_weights(module, wide)
    np.testing.assert_array_equal(module.head.dense.bias.detach(), wide[-1])


def test_arrays_are_copied_into_the_flat_vectors(arrays: Arrays) -> None:
    flat = FlatModule(small())
    for array in arrays:
        array.flags.writeable = False
    load_keras_weights(flat.module, arrays)
    flat.check_views()
    start = flat.parameter_segments[-1].offset
    found = flat.parameters[start : start + NUM_CLASSES]
    np.testing.assert_array_equal(found, arrays[-1])
    with torch.no_grad():
        flat.parameters.zero_()
    assert arrays[-1].any()


def tampered(arrays: Arrays, index: int, array: Any) -> Arrays:
    return [*arrays[:index], array, *arrays[index + 1 :]]


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (lambda a: a[:-2], "108 arrays .* has 110: .* whole model, with include_top=True$"),
        (
            lambda a: a[:-1],
            "109 arrays .* of Xception, of which Keras has 110: give those of the same model$",
        ),
        (lambda a: [*a, a[-1]], "111 arrays "),
        (lambda a: [], "0 arrays "),
        (
            lambda a: tampered(a, 0, a[0].transpose(3, 2, 0, 1)),
            r"array 0 of shape \(8, 3, 3, 3\) does not fit block1.conv1.weight of shape"
            r" \(8, 3, 3, 3\), which takes \(3, 3, 3, 8\) ",
        ),
        (
            lambda a: tampered(tampered(a, 108, a[108].T), 109, a[109][:-1]),
            r"array 108 of shape \(5, 104\) does not fit head.dense.weight of shape \(5, 104\),"
            r" which takes \(104, 5\) ",
        ),
        (
            lambda a: tampered(a, 109, a[109][:-1]),
            r"array 109 of shape \(4,\) does not fit head.dense.bias ",
        ),
        (
            lambda a: tampered(a, 109, a[109].astype(np.int64)),
            r"array 109 of shape \(5,\) for head.dense.bias holds int64",
        ),
        (lambda a: tampered(a, 109, a[109].astype(str)), "holds <U"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(
    arrays: Arrays, tamper: Callable[[Arrays], Arrays], expected: str
) -> None:
    assert len(arrays) == 110
    module = small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert re.search(expected, complaint(load_keras_weights, module, tamper(arrays)))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_one_inception_s_arrays_do_not_fit_the_other() -> None:
    todays, of_2016 = on_meta(inception_v3), on_meta(inception_v3_2016)
    arrays = random_arrays(keras_layers(todays))
    assert "378 arrays " in complaint(load_keras_weights, of_2016, arrays)


# Files


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
