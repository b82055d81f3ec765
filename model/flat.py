"""A module's parameters, gradients and batch norm statistics as three flat vectors.

A pull, a push and an update then are each one pass over contiguous memory, whatever the model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from model.errors import InputError

ALIGNMENT = 16
"""Elements: 64 bytes of float32, a cache line and the widest vector register."""


@dataclass(frozen=True)
class Segment:
    """Where one tensor lies in a flat vector; counts are elements, not bytes."""

    name: str
    shape: tuple[int, ...]
    offset: int
    decayed: bool
    """True for kernels of convolutions and dense layers: what weight decay covers."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.offset + self.numel


def parameter_segments(module: nn.Module) -> tuple[Segment, ...]:
    """The layout of the trainable parameters, in the order of `named_parameters`.

    It follows from names, shapes and layer types alone, so a module built on the meta device
    gives a server the layout that the real one gives a worker. (Built, not moved there: moving
    unties tied parameters.) A tied parameter has one segment, under its first name.

    Raises InputError for a lazy parameter, whose shape isn't known yet.
    """
    kernels = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, _ConvNd | nn.Linear)
        for name, parameter in part.named_parameters(recurse=False)
        if name == "weight"
    }
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return _lay_out((name, p, id(p) in kernels) for name, p in trainable)


def statistic_segments(module: nn.Module) -> tuple[Segment, ...]:
    """The layout of the floating point buffers that a state dict holds.

    These are the running means and variances of batch norm. Integer buffers, such as
    `num_batches_tracked`, have no place in a float vector and stay where they are.

    Raises InputError for a lazy buffer, whose shape isn't known yet.
    """
    return _lay_out((name, buffer, False) for name, buffer in _statistics(module).items())


def flat_numel(segments: Sequence[Segment]) -> int:
    """Elements of a vector that holds `segments`, a multiple of `ALIGNMENT`."""
    return _aligned(segments[-1].stop) if segments else 0


def named_views(vector: Tensor, segments: Sequence[Segment]) -> dict[str, Tensor]:
    """The parts of a flat vector of any dtype, by name and in shape, sharing its memory."""
    assert vector.shape == (flat_numel(segments),), "the vector must have the layout's length"
    return {s.name: vector[s.offset : s.stop].view(s.shape) for s in segments}


def copy_named_(vector: Tensor, segments: Sequence[Segment], tensors: Mapping[str, Tensor]) -> None:
    """Copy named tensors into a flat vector, in place, converting to its dtype and device.

    Everything is checked before the first element moves; padding is left alone.

    Raises InputError, naming the first culprit, if names are missing or too many, or if a
    shape is not the segment's.
    """
    _check_names(segments, tensors)
    views = named_views(vector, segments)
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(tensors[name])


class FlatModule:
    """A module whose parameters, gradients and statistics live in three flat float32 vectors.

    The module's tensors become views: a write to `parameters` or `statistics` is seen by the
    next forward pass, and a backward pass adds into `gradients`. Values, tensor identities and
    the state dict stay as they were; gradients start at zero, so a parameter that a backward
    pass doesn't reach has a zero gradient rather than none. Padding between segments is zero.

    Move the module to its device first; afterwards, `check_views` finds what broke the views.

    Raises InputError for frozen parameters, and for parameters or statistics that are lazy, not
    float32, on the meta device or on several devices.
    """

    def __init__(self, module: nn.Module) -> None:
        named_parameters = dict(module.named_parameters())
        named_statistics = _statistics(module)
        self.module = module
        self.parameter_segments = parameter_segments(module)
        self.statistic_segments = statistic_segments(module)
        _check_trainable(named_parameters)
        device = _common_device({**named_parameters, **named_statistics})
        self.parameters = _zeros(self.parameter_segments, device)
        self.gradients = _zeros(self.parameter_segments, device)
        self.statistics = _zeros(self.statistic_segments, device)
        self._parameters = named_views(self.parameters, self.parameter_segments)
        self._gradients = named_views(self.gradients, self.parameter_segments)
        self._statistics = named_views(self.statistics, self.statistic_segments)
        _rehouse(named_parameters, self._parameters)
        _rehouse(named_statistics, self._statistics)
        for name, parameter in named_parameters.items():
            parameter.grad = self._gradients[name]

    def place_gradients(self, vector: Tensor) -> None:
        """Let backward passes add into `vector` from now on, which becomes `gradients`.

        It must be of their length, dtype and device; its contents are kept, and are then the
        gradients. So they can live in memory that another process reads. Between passes only.
        """
        assert (vector.dtype, vector.device) == (self.gradients.dtype, self.gradients.device)
        views = named_views(vector, self.parameter_segments)
        for name, parameter in self.module.named_parameters():
            parameter.grad = views[name]
        self.gradients, self._gradients = vector, views

    def zero_gradients(self) -> None:
        """Zero all gradients in place; the module's own `zero_grad` would drop the views."""
        self.gradients.zero_()

    def check_views(self) -> None:
        """Raise InputError unless the module still computes in the flat vectors.

        `zero_grad(set_to_none=True)`, `to`, `half`, a replaced layer or a backward pass with
        `create_graph` part it from them, after which pulls and pushes would miss its values.
        """
        parameters = dict(self.module.named_parameters())
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        _check_kind("parameter", parameters, self._parameters)
        _check_kind("gradient", gradients, self._gradients)
        _check_kind("statistic", _statistics(self.module), self._statistics)


def _lay_out(tensors: Iterable[tuple[str, Tensor, bool]]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    offset = 0
    for name, tensor, decayed in tensors:
        if is_lazy(tensor):
            raise InputError(
                f"{name} is lazy and has no shape yet, so it has no place in a flat vector:"
                " run the module once on a sample before flattening it"
            )
        segments.append(Segment(name, tuple(tensor.shape), offset, decayed))
        offset = _aligned(segments[-1].stop)
    return tuple(segments)


def _aligned(num_elements: int) -> int:
    return -(-num_elements // ALIGNMENT) * ALIGNMENT


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    # Which buffers persist is public only through the state dict.
    persistent = module.state_dict().keys()
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        if name in persistent and buffer.is_floating_point()
    }


def _check_trainable(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            raise InputError(
                f"parameter {name} is frozen, and the servers would never update it:"
                " set requires_grad, or keep it as a buffer"
            )


def _common_device(tensors: Mapping[str, Tensor]) -> torch.device:
    device: torch.device | None = None
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise InputError(
                f"{name} is {tensor.dtype}, but flat vectors are torch.float32:"
                " call float() on the module, and use autocast for lower precision"
            )
        if tensor.is_meta:
            raise InputError(
                f"{name} is on the meta device and has no values to train:"
                " build the module on a real device"
            )
        device = device or tensor.device
        if tensor.device != device:
            raise InputError(
                f"{name} is on {tensor.device} and others are on {device}, but a flat vector"
                " lies on one device: move the whole module to one"
            )
    return device or torch.device("cpu")


def _zeros(segments: Sequence[Segment], device: torch.device) -> Tensor:
    return torch.zeros(flat_numel(segments), dtype=torch.float32, device=device)


def _rehouse(tensors: Mapping[str, Tensor], views: Mapping[str, Tensor]) -> None:
    """Copy each tensor into its view, then let the same tensor object use the view's memory."""
    for name, tensor in tensors.items():
        views[name].copy_(tensor.data)
        tensor.data = views[name]


def _check_kind(
    kind: str, tensors: Mapping[str, Tensor | None], views: Mapping[str, Tensor]
) -> None:
    mend = "flatten the module after moving or changing it"
    if kind == "gradient":
        mend = "call zero_gradients(), not zero_grad(), and backward() without create_graph"
    for name in dict.fromkeys((*views, *tensors)):
        if not _is_same(tensors.get(name), views.get(name)):
            raise InputError(
                f"{kind} {name} is not in the flat vector, so training would miss it: {mend}"
            )


def _is_same(tensor: Tensor | None, view: Tensor | None) -> bool:
    if tensor is None or view is None:
        return False
    # is_set_to raises, rather than saying no, where a device or layout has no memory to compare.
    alike = tensor.device == view.device and tensor.layout == view.layout
    return alike and tensor.is_set_to(view)


def _check_names(segments: Sequence[Segment], tensors: Mapping[str, Tensor]) -> None:
    known = {segment.name for segment in segments}
    for segment in segments:
        if segment.name not in tensors:
            raise InputError(
                f"tensor {segment.name!r} is missing, of which the model has one of shape"
                f" {segment.shape}: give tensors of the same model and settings"
            )
    for name in tensors:
        if name not in known:
            raise InputError(
                f"tensor {name!r} is none of the model's: give tensors of the same model and"
                " settings"
            )
    for segment in segments:
        shape = tuple(tensors[segment.name].shape)
        if shape != segment.shape:
            raise InputError(
                f"tensor {segment.name!r} has shape {shape}, and the model's has {segment.shape}:"
                " give tensors of the same model and settings"
            )
