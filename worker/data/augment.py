"""Random changes to training images, as a pure function of (seed, position)."""

from collections.abc import Sequence
from math import cos, exp, log, pi, sin, sqrt
from typing import Annotated, Literal, NamedTuple, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from model.settings import Settings
from worker.data.seeding import AUGMENT, random_words

# The loader's threads share the images among them; more threads would only fight for the cores.
cv2.setNumThreads(0)

_CROP_TRIES = 10
_WORDS_PER_TRY = 4
_FLIP, _DOWN, _RIGHT, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _CROP = range(8)
"""Which random word decides what. The first three keep their places whatever else is drawn."""

_LUMA = (0.299, 0.587, 0.114)
# Luma, and the two axes of colour of NTSC's YIQ, in which a change of hue is a rotation.
_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = np.linalg.inv(_YIQ)
_GREY = np.outer(_RGB[:, 0], _YIQ[0])
"""(3, 3), RGB to RGB: the grey part of a colour. The rest is `_COLOUR`."""
_COLOUR = _RGB[:, 1:] @ _YIQ[1:]
_TURNED = _RGB[:, 1:] @ np.array([[0, 1], [-1, 0]]) @ _YIQ[1:]
"""The rest, a quarter of the circle of colours further, from red through yellow."""

_Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_Strength = Annotated[float, Field(ge=0.0, le=1.0)]


class AugmentSettings(Settings):
    """Random changes to training images; evaluation uses the defaults, which change nothing.

    All is decided by training.seed and the image's place in the order of samples, so that every
    host and every retry sees the same. In this order: crop, brightness, contrast, saturation,
    hue, shift, flip.
    """

    horizontal_flip: bool = False
    """Mirror half of the images. Leave off where left and right matter, as in text."""
    max_shift: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Shift by up to this share of the side, in both directions; edge pixels fill the gap."""
    crop: Literal["none", "inception"] = "none"
    """inception: train on a random part of each image, of random shape, resized to a square, in
    place of what data.resize says (Szegedy et al., arXiv 1409.4842)."""
    crop_area: tuple[_Positive, Annotated[_Positive, Field(le=1.0)]] = (0.08, 1.0)
    """The part's least and largest share of the image's area."""
    crop_ratio: tuple[_Positive, _Positive] = (3 / 4, 4 / 3)
    """The part's least and largest width divided by its height."""
    brightness: _Strength = 0.0
    """Multiply by a factor between 1 minus this and 1 plus this."""
    contrast: _Strength = 0.0
    """Multiply the distance from the image's mean grey by a factor in 1 minus to 1 plus this."""
    saturation: _Strength = 0.0
    """Multiply the distance from the pixel's grey by a factor in 1 minus to 1 plus this."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Turn hues by up to this share of the circle of colours, in both directions."""

    @property
    def recolours(self) -> bool:
        """Whether colours are changed at all."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0

    @model_validator(mode="after")
    def _sensible_crop(self) -> Self:
        for name in ("crop_area", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(
                    f"data.augment.{name} = [{low}, {high}] has its bounds the wrong way round, "
                    f"so no crop would fit: write [{high}, {low}]"
                )
            if self.crop == "none" and (low, high) != type(self).model_fields[name].default:
                raise ValueError(
                    f"data.augment.{name} = [{low}, {high}] has no effect with data.augment.crop "
                    '= "none": remove it, or choose crop = "inception"'
                )
        return self


class Box(NamedTuple):
    """A part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    def scaled(self, old: tuple[int, int], new: tuple[int, int]) -> "Box":
        """The same part, to the nearest pixel, of the image resized from (H, W) to (H, W)."""
        top, bottom = _scaled(self.top, self.top + self.height, old[0], new[0])
        left, right = _scaled(self.left, self.left + self.width, old[1], new[1])
        return Box(top, left, bottom - top, right - left)

    def of(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A view of (H, W, 3)."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


class Draw(NamedTuple):
    """What happens to the image at one position."""

    flip: bool
    down: int
    """Pixels to shift by; so is `right`."""
    right: int
    brightness: float
    """1 changes nothing; so for contrast and saturation."""
    contrast: float
    saturation: float
    turn: float
    """Of hues, in radians, from red towards yellow."""
    crop_words: Sequence[int]
    """Four random words for each try."""


class Augmentation:
    """The settings' random changes to images of (3, image_size, image_size)."""

    def __init__(self, settings: AugmentSettings, image_size: int, seed: int) -> None:
        self.settings = settings
        self._seed = seed
        self._max_shift_pixels = int(settings.max_shift * image_size)
        self._num_words = _CROP
        if settings.crop == "inception":
            self._num_words += _CROP_TRIES * _WORDS_PER_TRY

    @property
    def changes(self) -> bool:
        """Whether there is anything to draw, the crop aside."""
        settings = self.settings
        return settings.horizontal_flip or self._max_shift_pixels > 0 or settings.recolours

    def draw(self, position: int) -> Draw:
        """The changes at a global position."""
        words = random_words(self._num_words, self._seed, AUGMENT, position).tolist()
        settings, span = self.settings, 2 * self._max_shift_pixels + 1
        return Draw(
            flip=settings.horizontal_flip and bool(words[_FLIP] & 1),
            down=words[_DOWN] % span - self._max_shift_pixels,
            right=words[_RIGHT] % span - self._max_shift_pixels,
            brightness=_uniform(
                words[_BRIGHTNESS], 1 - settings.brightness, 1 + settings.brightness
            ),
            contrast=_uniform(words[_CONTRAST], 1 - settings.contrast, 1 + settings.contrast),
            saturation=_uniform(
                words[_SATURATION], 1 - settings.saturation, 1 + settings.saturation
            ),
            turn=2 * pi * _uniform(words[_HUE], -settings.hue, settings.hue),
            crop_words=words[_CROP:],
        )

    def crop(self, draw: Draw, height: int, width: int) -> Box:
        """The part to train on of an image of this size: Inception's random resized crop.

        Up to ten times an area and a ratio (evenly in its logarithm) are drawn, until they fit;
        else it is the largest part in the middle of an allowed ratio, as in torchvision.
        """
        settings = self.settings
        low, high = map(log, settings.crop_ratio)
        for first in range(0, len(draw.crop_words), _WORDS_PER_TRY):
            area_word, ratio_word, top, left = draw.crop_words[first : first + _WORDS_PER_TRY]
            area = height * width * _uniform(area_word, *settings.crop_area)
            ratio = exp(_uniform(ratio_word, low, high))
            box_height, box_width = round(sqrt(area / ratio)), round(sqrt(area * ratio))
            if 0 < box_height <= height and 0 < box_width <= width:
                return Box(
                    _below(top, height - box_height + 1),
                    _below(left, width - box_width + 1),
                    box_height,
                    box_width,
                )
        return _central(height, width, settings.crop_ratio)

    def recolour(self, pixels: NDArray[np.uint8], draw: Draw) -> NDArray[np.uint8]:
        """(H, W, 3) with other colours, or as it is.

        Brightness, contrast, saturation and hue are affine in RGB, so all four are one matrix;
        unlike one after the other, it rounds and clips once, in the end. A hue is turned about
        the axis of greys, which leaves luma as it is.
        """
        if not self.settings.recolours:
            return pixels
        matrix = _colour_matrix(draw, cv2.mean(pixels)[:3])
        return np.asarray(cv2.transform(pixels, matrix), np.uint8)

    def move(self, image: NDArray[np.uint8], draw: Draw) -> NDArray[np.uint8]:
        """(3, S, S) shifted and flipped, or as it is; `image` itself is left alone."""
        if draw.down:
            image = _shift_rows(image, draw.down)
        if draw.right:
            image = _shift_rows(image.swapaxes(1, 2), draw.right).swapaxes(1, 2)
        if draw.flip:
            rows = image.reshape(-1, image.shape[2])
            image = np.asarray(cv2.flip(rows, 1), np.uint8).reshape(image.shape)
        return image


def crop_resized(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(H, W, 3), a view perhaps, to (size, size, 3).

    Bilinear between neighbouring pixels, as Inception's own training did; pixels are averaged
    only where neighbours alone would miss some, from a half on.
    """
    height, width = pixels.shape[:2]
    averaged = min(height, width) >= size and max(height, width) >= 2 * size
    method = cv2.INTER_AREA if averaged else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (size, size), interpolation=method), np.uint8)


def channels_first(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) to contiguous (3, H, W)."""
    planes = np.empty((3, *pixels.shape[:2]), np.uint8)
    cv2.split(pixels, list(planes))
    return planes


def channels_last(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(3, H, W) to contiguous (H, W, 3)."""
    return np.asarray(cv2.merge(list(image)), np.uint8)


def _uniform(word: int, low: float, high: float) -> float:
    return low + (high - low) * ((word >> 11) * 2.0**-53)


def _below(word: int, limit: int) -> int:
    return word * limit >> 64


def _scaled(start: int, stop: int, old: int, new: int) -> tuple[int, int]:
    """At least one pixel, within the `new` ones."""
    start = min(round(start * new / old), new - 1)
    return start, max(start + 1, min(round(stop * new / old), new))


def _central(height: int, width: int, ratio: tuple[float, float]) -> Box:
    box_height = max(1, min(height, round(width / ratio[0])))
    box_width = max(1, min(width, round(height * ratio[1])))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def _colour_matrix(draw: Draw, mean: Sequence[float]) -> NDArray[np.float64]:
    """(3, 4): RGB and 1 to RGB, for an image with these mean R, G and B.

    Saturation scales the part of a colour that isn't grey, and hue turns it; what contrast adds
    is grey, so neither changes that.
    """
    scale = draw.contrast * draw.brightness
    along, across = draw.saturation * cos(draw.turn), draw.saturation * sin(draw.turn)
    grey = sum(share * value for share, value in zip(_LUMA, mean, strict=True))
    matrix = np.empty((3, 4))
    matrix[:, :3] = scale * (_GREY + along * _COLOUR + across * _TURNED)
    matrix[:, 3] = (1 - draw.contrast) * draw.brightness * grey
    return matrix


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
