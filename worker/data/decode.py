"""From encoded bytes to RGB pixels; JPEG by libjpeg-turbo, all else by Pillow."""

import io
import struct
import zlib
from math import ceil
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from simplejpeg import decode_jpeg, decode_jpeg_header

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
_JPEG_START = b"\xff\xd8\xff"
# What libjpeg-turbo turns into RGB. Of CMYK there are two conventions, which Pillow tells apart.
_JPEG_COLOURS = ("YCbCr", "Gray", "RGB")
# Beyond it Pillow refuses to decode, about 179 million.
_PILLOW_MAX_PIXELS = 2 * (2**30 // 12)


class CorruptImage(Exception):
    """The bytes do not decode to an image that can be used."""


class EncodedImage(Protocol):
    """An image of which the header is known: its size, and its pixels when they are asked for."""

    @property
    def height(self) -> int:
        """As stored."""
        ...

    @property
    def width(self) -> int:
        """As stored."""
        ...

    def rgb(self, shrink: float = 1.0) -> NDArray[np.uint8]:
        """RGB, (H, W, 3); read-only for the caller.

        Where that is cheap, both sides may be up to `shrink` times smaller than stored; they are
        then at least 2 times smaller. Raises CorruptImage.
        """
        ...


def open_image(content: bytes | NDArray[np.uint8], max_pixels: int) -> EncodedImage:
    """An encoded file, or RGB pixels (H, W, 3), to be decoded.

    An orientation noted in a camera's EXIF is not applied, as the field's loaders don't: labels
    were given, and published models trained, that way. Raises CorruptImage for what is no image
    of a known format, and for more than `max_pixels` or 179 million pixels; nothing has been
    decoded then.
    """
    image = _opened(content)
    limit = max_pixels if isinstance(image, _Pixels) else min(max_pixels, _PILLOW_MAX_PIXELS)
    if image.width * image.height > limit:
        raise CorruptImage(f"{image.width} x {image.height} pixels are too many")
    return image


def _opened(content: bytes | NDArray[np.uint8]) -> EncodedImage:
    if not isinstance(content, bytes):
        return _Pixels(content)
    if content.startswith(_JPEG_START):
        try:
            height, width, colours, _ = decode_jpeg_header(content)
        except ValueError:
            return _PillowImage(content)
        if colours in _JPEG_COLOURS and min(height, width) >= 1:
            return _Jpeg(content, height, width)
    return _PillowImage(content)


class _Pixels:
    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        assert pixels.dtype == np.uint8, pixels.dtype
        assert pixels.ndim == 3, pixels.shape
        self.height, self.width, channels = pixels.shape
        assert channels == 3, channels
        self._pixels = pixels

    def rgb(self, shrink: float = 1.0) -> NDArray[np.uint8]:
        return self._pixels


class _Jpeg:
    """Of libjpeg-turbo's colours. The whole image is the same, bit for bit, as Pillow's."""

    def __init__(self, content: bytes, height: int, width: int) -> None:
        self._content = content
        self.height, self.width = height, width

    def rgb(self, shrink: float = 1.0) -> NDArray[np.uint8]:
        # Less would save nothing: of the inverse transforms, those to a half or less are faster.
        share = 1 / shrink if shrink >= 2 else 1.0
        least = {"min_height": ceil(self.height * share), "min_width": ceil(self.width * share)}
        try:
            pixels: NDArray[np.uint8] = decode_jpeg(self._content, **least)
        except ValueError:
            # It stops at the slightest damage; what can still be used, Pillow decides.
            return _PillowImage(self._content).rgb()
        return pixels


class _PillowImage:
    """Raises CorruptImage, also on construction."""

    def __init__(self, content: bytes) -> None:
        try:
            self._image = Image.open(io.BytesIO(content), formats=_FORMATS)
        except _DAMAGE as error:
            raise CorruptImage(str(error)) from error
        self.width, self.height = self._image.size

    def rgb(self, shrink: float = 1.0) -> NDArray[np.uint8]:
        try:
            with self._image as image:
                return np.asarray(_to_rgb(image))
        except _DAMAGE as error:
            raise CorruptImage(str(error)) from error


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
