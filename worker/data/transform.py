"""From encoded bytes to the uint8 image that a network is fed."""

from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from model.settings import Settings
from worker.data.augment import (
    Augmentation,
    AugmentSettings,
    Draw,
    channels_first,
    channels_last,
    crop_resized,
)
from worker.data.decode import CorruptImage, open_image

__all__ = ["AugmentSettings", "CorruptImage", "ResizeSettings", "Transform", "normalize"]


class ResizeSettings(Settings):
    """How an image becomes a square; for training, where data.augment.crop doesn't say it."""

    mode: Literal["stretch", "center_crop"] = "stretch"
    """stretch: the whole image, its aspect ratio lost; center_crop: the square in its middle."""
    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.875
    """For center_crop: the square's side as a share of the image's shorter side."""

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """(left, upper, right, lower) of what is kept of an image."""
        if self.mode == "stretch":
            return 0.0, 0.0, float(width), float(height)
        side = self.crop_fraction * min(height, width)
        left, upper = (width - side) / 2, (height - side) / 2
        return left, upper, left + side, upper + side


class Transform:
    """Decode and resize to a square, then augment by position.

    image_size: side of the output in pixels.
    seed: with a sample's global position it determines the sample's augmentation.
    max_pixels: larger images are refused before they are decoded; Pillow's own limit of about
    179 million stays in force.
    resize: without effect where the augmentation crops.

    A JPEG of at least twice the size that is needed is decoded at a half, a quarter or another
    eighth of its size, no less than that needed: most of the inverse transform is saved.
    """

    def __init__(
        self,
        image_size: int,
        seed: int = 0,
        augment: AugmentSettings | None = None,
        max_pixels: int = 64_000_000,
        resize: ResizeSettings | None = None,
    ) -> None:
        assert image_size >= 1, image_size
        self.image_size = image_size
        self._augmentation = Augmentation(augment or AugmentSettings(), image_size, seed)
        self._crops = self._augmentation.settings.crop != "none"
        self._resize = resize or ResizeSettings()
        self._max_pixels = max_pixels

    def load(self, content: bytes | NDArray[np.uint8], position: int) -> NDArray[np.uint8]:
        """The image as it is seen at a global position: uint8 (3, image_size, image_size), RGB.

        What `augment` makes of `decode`, but where a large JPEG is cropped, the part is cut from
        one decoded at a smaller size, and is the same to within a pixel. Raises as `decode`.
        """
        if not self._crops:
            return self.augment(self.decode(content), position)
        image = open_image(content, self._max_pixels)
        draw = self._augmentation.draw(position)
        box = self._augmentation.crop(draw, image.height, image.width)
        pixels = image.rgb(min(box.height, box.width) / self.image_size)
        height, width = pixels.shape[:2]
        box = box.scaled((image.height, image.width), (height, width))
        return self._finished(box.of(pixels), draw)

    def decode(self, content: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What `augment` needs at every position, uint8, RGB; the same for the same bytes.

        (3, image_size, image_size), or the whole image, (H, W, 3), where `augment` crops. Raises
        CorruptImage for damaged, truncated, unsupported or too large images.
        """
        image = open_image(content, self._max_pixels)
        if self._crops:
            return image.rgb()
        box = self._resize.box(image.height, image.width)
        pixels = image.rgb(min(box[2] - box[0], box[3] - box[1]) / self.image_size)
        box = self._resize.box(*pixels.shape[:2])
        size = (self.image_size, self.image_size)
        # Pillow's averages over all pixels that it shrinks: what models are evaluated with.
        resized = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box)
        return channels_first(np.asarray(resized))

    def augment(self, image: NDArray[np.uint8], position: int) -> NDArray[np.uint8]:
        """The decoded image as it is seen at a global position; `image` itself is left alone."""
        augmentation = self._augmentation
        if self._crops:
            draw = augmentation.draw(position)
            return self._finished(augmentation.crop(draw, *image.shape[:2]).of(image), draw)
        if not augmentation.changes:
            return image
        draw = augmentation.draw(position)
        if augmentation.settings.recolours:
            image = channels_first(augmentation.recolour(channels_last(image), draw))
        return augmentation.move(image, draw)

    def _finished(self, part: NDArray[np.uint8], draw: Draw) -> NDArray[np.uint8]:
        """The part to train on, (H, W, 3), as the network sees it."""
        square = crop_resized(part, self.image_size)
        image = channels_first(self._augmentation.recolour(square, draw))
        return self._augmentation.move(image, draw)


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images to [-1, 1], with 0 and 255 at the ends, rounded to `dtype` only once."""
    return images.to(torch.float32).div_(127.5).sub_(1.0).to(dtype)
