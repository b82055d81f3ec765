"""Keras's arrays, without Keras: their order, and loading them. `test_keras_parity.py` has it."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from keras_arrays import (
    NUM_CLASSES,
    Arrays,
    complaint,
    inception_v3,
    inception_v3_2016,
    on_meta,
    random_arrays,
    small,
    tampered,
)
from torch import nn

from model.flat import FlatModule
from model.inception_v3 import (
    InceptionV3,
    InceptionV3Settings,
)
from model.keras_layers import keras_layers
from model.keras_weights import load_keras_weights
from model.resnet import ResNet152, ResNet152Settings
from model.vgg import VGG16, VGG16Settings
from model.xception import Xception, XceptionSettings


@pytest.fixture
def arrays() -> Arrays:
    return random_arrays(keras_layers(small()))


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
