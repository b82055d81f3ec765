"""What every model asks of its images."""

from torch import Tensor

from model.errors import InputError


def check_images(model: str, images: Tensor, smallest_size: int) -> None:
    """Raises InputError unless images are (N, 3, H, W), both sides at least `smallest_size`.

    smallest_size: pixels, below which the model's strides leave nothing.
    """
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3:
        raise InputError(f"images have shape {shape}, but {model} takes (N, 3, height, width)")
    if min(shape[2:]) < smallest_size:
        raise InputError(
            f"images of {shape[2]}x{shape[3]} pixels vanish in the strides of {model}:"
            f" make them at least {smallest_size}x{smallest_size}"
        )
