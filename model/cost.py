"""What a model costs: parameters, multiplications, memory for activations."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.flat import parameter_segments, statistic_segments

_PROBE_IMAGES = 2
"""Batch norm refuses to train on a single value per channel, as 1x1 maps of one image are."""

_BYTES_PER_ELEMENT = 4


@dataclass(frozen=True)
class ModelCost:
    """Counts of one model at one image size, in float32."""

    num_parameters: int
    """Trainable parameters."""
    num_statistics: int
    """Elements of batch norm's running statistics."""
    num_macs: int
    """Multiply-accumulates of convolutions and matrix products, forward, per image."""
    num_activation_bytes: int
    """What a forward pass keeps for the backward pass, per image."""

    @property
    def num_wire_bytes(self) -> int:
        """Bytes of one pull, or of one push: parameters and statistics, without padding."""
        return _BYTES_PER_ELEMENT * (self.num_parameters + self.num_statistics)


def measure_cost(build: Callable[[], nn.Module], image_size: int) -> ModelCost:
    """Counts without computing anything: the model is built and run on the meta device.

    image_size: side of the images, in pixels. Raises InputError for a size that is too small.
    """
    with torch.device("meta"):
        module = build()
        images = torch.empty(_PROBE_IMAGES, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(images)
    return ModelCost(
        sum(segment.numel for segment in parameter_segments(module)),
        sum(segment.numel for segment in statistic_segments(module)),
        counter.get_total_flops() // (2 * _PROBE_IMAGES),
        _saved_bytes(module.train(), images) // _PROBE_IMAGES,
    )


def _saved_bytes(module: nn.Module, images: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters and images excluded."""
    known = {_storage(tensor) for tensor in (*module.parameters(), *module.buffers(), images)}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        # Held on to, since the address of a storage that is freed may be given out again.
        kept.setdefault(_storage(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(images)
    storages = {address: tensor.untyped_storage() for address, tensor in kept.items()}
    return sum(s.nbytes() for address, s in storages.items() if address not in known)


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
