"""Our models as Keras sees them: which layers, in which order, with which weights.

Keras orders a model's layers by depth, counted back from the output, and layers of one depth by
the branch that they are on. `get_weights()` and Keras's files follow that order, in which the
branches of an Inception block are interleaved.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from model.errors import InputError
from model.inception_blocks import Branches, ConvBatchNormRelu, ConvReluBatchNorm
from model.inception_v3 import InceptionV3, InceptionV3Of2016
from model.separable import SegmentedConv2d
from model.spectrum import SpectrumConv2d
from model.xception import Xception

_KERNEL_AXES = (3, 2, 0, 1)
_DEPTHWISE_AXES = (2, 3, 0, 1)
_DENSE_AXES = (1, 0)
_VECTOR_AXES = (0,)


class KerasWeight(NamedTuple):
    """One of our tensors, and how Keras's array becomes it."""

    name: str
    """In our state dict."""
    tensor: Tensor
    axes: tuple[int, ...]
    """Where each of our axes is among Keras's: HWIO kernels, HWC1 depthwise ones, IO dense ones."""

    @property
    def keras_shape(self) -> tuple[int, ...]:
        sizes = dict(zip(self.axes, self.tensor.shape, strict=True))
        return tuple(sizes[axis] for axis in range(len(sizes)))


class KerasLayer(NamedTuple):
    """A layer of Keras's that has weights."""

    kind: str
    """Keras's class in snake case, as in the groups of a `.weights.h5` file."""
    weights: tuple[KerasWeight, ...]


def keras_layers(module: nn.Module) -> list[KerasLayer]:
    """The layers with weights, in the order of Keras's `model.layers`. Works on the meta device.

    Raises InputError unless the module is an Xception with separable layers as in Keras or an
    Inception V3, either one, and its head is one dense layer.
    """
    if isinstance(module, Xception):
        layers = list(_xception_layers(module))
    elif isinstance(module, InceptionV3 | InceptionV3Of2016):
        layers = list(_inception_layers(module))
    else:
        raise InputError(
            f"the layers of a {type(module).__name__} in Keras are not known: choose xception,"
            " inception_v3 or inception_v3_2016"
        )
    if module.head.num_hidden:
        raise InputError(
            f"fc_widths puts {module.head.num_hidden} layers into the head that Keras's model"
            " has not: leave it empty"
        )
    return [*layers, _dense("head.dense", module.head.dense)]


def _xception_layers(module: Xception) -> Iterator[KerasLayer]:
    """In the order of our modules: Keras has the shortcuts after the layers they go around."""
    parts = {name: part for name, part in module.named_modules() if not name.startswith("head")}
    for name, part in parts.items():
        if isinstance(part, SpectrumConv2d):
            raise InputError(
                'separable_order = "pointwise_first" has no layer in Keras:'
                ' choose "spatial_first", which is a SeparableConv2D'
            )
        if isinstance(part, SegmentedConv2d):
            pointwise = name.replace("depthwise", "pointwise")
            yield _separable(name, part, pointwise, parts[pointwise])
        elif isinstance(part, nn.BatchNorm2d):
            yield _batch_norm(name, part)
        elif isinstance(part, nn.Conv2d) and not name.endswith("pointwise"):
            yield _conv(name, part)


class _Placed(NamedTuple):
    depth: int
    layer: KerasLayer


def _inception_layers(module: InceptionV3 | InceptionV3Of2016) -> Iterator[KerasLayer]:
    placed: list[_Placed] = []
    depth = 0
    for name in reversed(module.part_names):
        depth = _place(name, getattr(module, name), depth, placed)
    # Sorting is stable: where depths are equal, branches keep their order.
    yield from (each.layer for each in sorted(placed, key=lambda each: -each.depth))


def _place(name: str, part: nn.Module, depth: int, placed: list[_Placed]) -> int:
    """Append the part's layers, last ones first, with their depths.

    depth: of the layer that follows. Returns that of the part's first one.
    """
    if isinstance(part, nn.Sequential):
        for key, child in reversed(list(part.named_children())):
            depth = _place(f"{name}.{key}", child, depth, placed)
        return depth
    if isinstance(part, Branches):
        concatenation = depth + 1
        branches = part.named_children()
        return max(_place(f"{name}.{key}", each, concatenation, placed) for key, each in branches)
    if isinstance(part, ConvBatchNormRelu | ConvReluBatchNorm):
        # Today's ReLU is a layer of its own; that of 2016 was a setting of the convolution.
        depth += 1 if isinstance(part, ConvBatchNormRelu) else 0
        placed.append(_Placed(depth + 1, _batch_norm(f"{name}.bn", part.bn)))
        placed.append(_Placed(depth + 2, _conv(f"{name}.conv", part.conv)))
        return depth + 2
    return depth + 1


def _separable(
    depthwise_name: str, depthwise: SegmentedConv2d, pointwise_name: str, pointwise: nn.Module
) -> KerasLayer:
    if depthwise.groups != depthwise.in_channels:
        raise InputError(
            f"segments = {depthwise.groups} has no layer in Keras:"
            ' choose "depthwise", which is a SeparableConv2D'
        )
    assert isinstance(pointwise, nn.Conv2d), pointwise
    weights = (
        KerasWeight(f"{depthwise_name}.weight", depthwise.weight, _DEPTHWISE_AXES),
        KerasWeight(f"{pointwise_name}.weight", pointwise.weight, _KERNEL_AXES),
    )
    return KerasLayer("separable_conv2d", weights)


def _conv(name: str, conv: nn.Conv2d) -> KerasLayer:
    kernel = KerasWeight(f"{name}.weight", conv.weight, _KERNEL_AXES)
    return KerasLayer("conv2d", (kernel, *_vectors(name, {"bias": conv.bias})))


def _batch_norm(name: str, norm: nn.BatchNorm2d) -> KerasLayer:
    vectors = {
        "weight": norm.weight,
        "bias": norm.bias,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }
    return KerasLayer("batch_normalization", tuple(_vectors(name, vectors)))


def _dense(name: str, dense: nn.Linear) -> KerasLayer:
    kernel = KerasWeight(f"{name}.weight", dense.weight, _DENSE_AXES)
    return KerasLayer("dense", (kernel, *_vectors(name, {"bias": dense.bias})))


def _vectors(layer: str, tensors: dict[str, Tensor | None]) -> Iterator[KerasWeight]:
    for name, tensor in tensors.items():
        if tensor is not None:
            yield KerasWeight(f"{layer}.{name}", tensor, _VECTOR_AXES)
