"""From encoded bytes to the uint8 image that a network is fed."""

import io
import struct
import zlib
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from model.settings import Settings
from worker.data.seeding import AUGMENT, random_words

# Formats that a browser or a camera writes; others Pillow may hand to external programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
# What Pillow's decoders raise on damaged bytes, its own and what their Python parts let through.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class CorruptImage(Exception):
    """The bytes do not decode to an image that can be used."""


class AugmentSettings(Settings):
    """Random changes to training images; evaluation uses the defaults, which change nothing."""

    horizontal_flip: bool = False
    """Mirror half of the images. Leave off where left and right matter, as in text."""
    max_shift: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Shift by up to this share of the side, in both directions; edge pixels fill the gap."""


class Transform:
    """Decode and resize to a square, then augment by position.

    image_size: side of the output in pixels; the aspect ratio is not kept.
    seed: with a sample's global position it determines the sample's augmentation.
    max_pixels: larger images are refused before they are decoded; Pillow's own limit of about
    179 million stays in force.
    """

    def __init__(
        self,
        image_size: int,
        seed: int = 0,
        augment: AugmentSettings | None = None,
        max_pixels: int = 64_000_000,
    ) -> None:
        assert image_size >= 1, image_size
        self.image_size = image_size
        self._seed = seed
        self._augment = augment or AugmentSettings()
        self._max_shift_pixels = int(self._augment.max_shift * image_size)
        self._max_pixels = max_pixels

    def load(self, content: bytes | NDArray[np.uint8], position: int) -> NDArray[np.uint8]:
        """The image as it is seen at a global position: `decode`, then `augment`."""
        return self.augment(self.decode(content), position)

    def decode(self, content: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 (3, image_size, image_size), RGB; the same for the same bytes.

        Raises CorruptImage for damaged, truncated, unsupported or too large images.
        """
        size = (self.image_size, self.image_size)
        try:
            with _opened(content) as image:
                if image.width * image.height > self._max_pixels:
                    raise CorruptImage(f"{image.width} x {image.height} pixels are too many")
                rgb = _to_rgb(image)
            if rgb.size != size:
                rgb = rgb.resize(size, Image.Resampling.BILINEAR)
        except _DAMAGE as error:
            raise CorruptImage(str(error)) from error
        return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))

    def augment(self, image: NDArray[np.uint8], position: int) -> NDArray[np.uint8]:
        """The decoded image as it is seen at a global position; `image` itself is left alone."""
        if not (self._augment.horizontal_flip or self._max_shift_pixels):
            return image
        flip, down, right = random_words(3, self._seed, AUGMENT, position).tolist()
        if self._max_shift_pixels:
            image = _shift_rows(image, self._shift_pixels(down))
            image = _shift_rows(image.swapaxes(1, 2), self._shift_pixels(right)).swapaxes(1, 2)
        if self._augment.horizontal_flip and flip & 1:
            image = image[:, :, ::-1]
        return image

    def _shift_pixels(self, word: int) -> int:
        return word % (2 * self._max_shift_pixels + 1) - self._max_shift_pixels


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images to [-1, 1], with 0 and 255 at the ends, rounded to `dtype` only once."""
    return images.to(torch.float32).div_(127.5).sub_(1.0).to(dtype)


def _opened(content: bytes | NDArray[np.uint8]) -> Image.Image:
    if isinstance(content, bytes):
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    return Image.fromarray(content)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; what is transparent shows white."""
    if image.mode.startswith("I"):
        # 16-bit grey (older Pillow decodes it to 32 bits): keep the upper byte.
        grey = np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode == "F":
        raise CorruptImage("floating-point pixels have no defined range")
    return image.convert("RGB")


def _shift_rows(image: NDArray[np.uint8], down: int) -> NDArray[np.uint8]:
    """Move (C, H, W) by |down| < H rows, repeating the edge."""
    height = image.shape[1]
    shifted = np.empty_like(image)
    moved = image[:, max(0, -down) : height - max(0, down)]
    shifted[:, max(0, down) : height - max(0, -down)] = moved
    if down > 0:
        shifted[:, :down] = image[:, :1]
    elif down < 0:
        shifted[:, down:] = image[:, -1:]
    return shifted
