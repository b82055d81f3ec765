from math import pi, sqrt
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from pydantic import ValidationError

from worker.data.augment import (
    Augmentation,
    AugmentSettings,
    Box,
    Draw,
    channels_first,
    channels_last,
    crop_resized,
)

RNG = np.random.default_rng(0)
positions = st.integers(0, 2**62)


def augmentation(size: int = 32, seed: int = 3, **values: Any) -> Augmentation:
    return Augmentation(AugmentSettings(**values), size, seed)


def drawn(**values: Any) -> Draw:
    nothing = {"flip": False, "down": 0, "right": 0, "turn": 0.0, "crop_words": ()}
    return Draw(**nothing | {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0} | values)


def spans(low: float, high: float) -> st.SearchStrategy[tuple[float, float]]:
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda p: (min(p), max(p)))


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), spans(0.01, 1.0), spans(0.2, 5.0), positions)
def test_crops_have_the_area_and_ratio_asked_for(
    height: int,
    width: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    position: int,
) -> None:
    augment = augmentation(crop="inception", crop_area=area, crop_ratio=ratio)
    box = augment.crop(augment.draw(position), height, width)
    assert 0 <= box.top <= box.top + box.height <= height
    assert 0 <= box.left <= box.left + box.width <= width
    assert min(box.height, box.width) >= 1
    assume(min(box.height, box.width) > 1)
    # Both sides are rounded to whole pixels.
    assert (box.width + 0.5) / (box.height - 0.5) >= ratio[0]
    assert (box.width - 0.5) / (box.height + 0.5) <= ratio[1]
    fitting = min(1.0, area[0])
    if box != central(height, width, ratio):
        assert (box.width + 0.5) * (box.height + 0.5) >= fitting * height * width
        assert (box.width - 0.5) * (box.height - 0.5) <= area[1] * height * width


def central(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """As in torchvision's RandomResizedCrop.get_params."""
    if width / height < ratio[0]:
        box_height, box_width = round(width / ratio[0]), width
    elif width / height > ratio[1]:
        box_height, box_width = height, round(height * ratio[1])
    else:
        box_height, box_width = height, width
    box_height, box_width = max(1, box_height), max(1, box_width)
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


@given(st.integers(1, 50), st.integers(300, 900), st.booleans(), positions)
def test_what_no_crop_fits_is_cut_in_the_middle(
    short: int, long: int, tall: bool, position: int
) -> None:
    height, width = (long, short) if tall else (short, long)
    augment = augmentation(crop="inception", crop_area=(0.9, 1.0))
    box = augment.crop(augment.draw(position), height, width)
    assert box == central(height, width, (3 / 4, 4 / 3))


def test_ten_crops_are_tried() -> None:
    augment = augmentation(crop="inception")
    all_of_it, little, narrow = 2**64 - 1, 0, 0
    misfit = (all_of_it, narrow, 0, 0)  # of a square
    fit = (little, narrow, all_of_it, 0)
    words = (*misfit * 9, *fit)
    assert len(augment.draw(0).crop_words) == len(words)
    # 0.08 of the area at 3 / 4, at the bottom on the left.
    assert augment.crop(drawn(crop_words=words), 100, 100) == Box(67, 0, 33, 24)
    assert augment.crop(drawn(crop_words=misfit * 10), 100, 100) == Box(0, 0, 100, 100)


def test_crops_are_spread_evenly() -> None:
    augment = augmentation(crop="inception", crop_ratio=(1.0, 1.0))
    side, number = 1000, 2000
    boxes = [augment.crop(augment.draw(p), side, side) for p in range(number)]
    for values in (
        [((box.height / side) ** 2 - 0.08) / 0.92 for box in boxes],
        [box.top / (side - box.height) for box in boxes if box.height < side - 50],
        [box.left / (side - box.width) for box in boxes if box.width < side - 50],
    ):
        # Kolmogorov and Smirnov's statistic, at about one in a million.
        expected = (np.arange(len(values)) + 0.5) / len(values)
        assert np.abs(np.sort(values) - expected).max() < 2.6 / sqrt(len(values))
    places = [(box.top, box.left) for box in boxes if box.height < side // 2]
    assert abs(np.corrcoef(np.transpose(places))[0, 1]) < 0.2
    wide = augmentation(crop="inception", crop_area=(0.1, 0.2))
    ratios = [wide.crop(wide.draw(p), side, side) for p in range(number)]
    logarithms = np.log([box.width / box.height for box in ratios]) / np.log(4 / 3)
    expected = np.linspace(-1, 1, number)
    assert np.abs(np.sort(logarithms) - expected).max() < 2 * 2.6 / sqrt(number)


@given(positions)
def test_draws_do_not_depend_on_what_else_is_drawn(position: int) -> None:
    plain = augmentation(horizontal_flip=True, max_shift=0.3).draw(position)
    rich = augmentation(
        horizontal_flip=True, max_shift=0.3, crop="inception", contrast=0.5, hue=0.1
    ).draw(position)
    assert (plain.flip, plain.down, plain.right) == (rich.flip, rich.down, rich.right)


def test_colours_are_drawn_within_their_strengths() -> None:
    strengths = {"brightness": 0.1, "contrast": 0.2, "saturation": 0.4}
    augment = augmentation(**strengths, hue=0.25)
    draws = [augment.draw(position) for position in range(1000)]
    for name, strength in strengths.items():
        values = np.array([getattr(draw, name) for draw in draws])
        assert np.abs(values - 1).max() <= strength
        assert values.min() < 1 - 0.95 * strength
        assert values.max() > 1 + 0.95 * strength
    turns = np.array([draw.turn for draw in draws])
    assert 0.95 * pi / 2 < np.abs(turns).max() <= pi / 2
    assert turns.min() < 0 < turns.max()


MIDDLE = RNG.integers(90, 166, (24, 30, 3), dtype=np.uint8)
"""Colours that no factor below drives to an end, where Pillow's steps would clip."""
factors = st.floats(0.7, 1.3)


@settings(deadline=None)
@given(factors, factors, factors)
def test_colours_change_as_with_pillow(
    brightness: float, contrast: float, saturation: float
) -> None:
    draw = drawn(brightness=brightness, contrast=contrast, saturation=saturation)
    image = Image.fromarray(MIDDLE)
    image = ImageEnhance.Brightness(image).enhance(brightness)
    image = ImageEnhance.Contrast(image).enhance(contrast)
    expected = np.asarray(ImageEnhance.Color(image).enhance(saturation))
    assume(expected.min() > 0)
    assume(expected.max() < 255)
    pixels = augmentation(brightness=0.3).recolour(MIDDLE, draw)
    # Pillow rounds or truncates in every step, we do once.
    assert np.abs(pixels.astype(int) - expected).max() <= 4


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_one_change_clips_as_pillow_does(name: str, factor: float) -> None:
    kind = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}[name]
    pixels = RNG.integers(0, 256, (24, 30, 3), dtype=np.uint8)
    expected = getattr(ImageEnhance, kind)(Image.fromarray(pixels)).enhance(factor)
    found = augmentation(**{name: 1.0}).recolour(pixels, drawn(**{name: factor}))
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 2


def luma(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    return pixels @ np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("turn", [-pi / 2, 0.3, 1.0, pi])
def test_a_turn_of_hue_keeps_luma_and_greys(turn: float) -> None:
    augment = augmentation(hue=0.5)
    pale = MIDDLE // 4 + 96
    pixels = augment.recolour(pale, drawn(turn=turn))
    assert np.abs(luma(pixels) - luma(pale)).max() <= 1
    assert np.abs(pixels.astype(int) - pale).max() > 2
    grey = np.full((4, 4, 3), 77, np.uint8)
    np.testing.assert_array_equal(augment.recolour(grey, drawn(turn=turn)), grey)
    back = augment.recolour(pixels, drawn(turn=-turn))
    assert np.abs(back.astype(int) - pale).max() <= 2


def test_changes_of_colour_are_made_in_order() -> None:
    augment = augmentation(hue=0.5)
    values = {"brightness": 1.1, "contrast": 0.7, "saturation": 1.3, "turn": 0.5}
    pixels = MIDDLE
    for name, value in values.items():
        pixels = augment.recolour(pixels, drawn(**{name: value}))
    difference = augment.recolour(MIDDLE, drawn(**values)).astype(int) - pixels
    assert np.abs(difference).max() <= 3
    grey = augment.recolour(MIDDLE, drawn(saturation=0.0, turn=1.0))
    assert (grey == grey[..., :1]).all()


def test_a_small_turn_goes_the_way_of_the_circle_of_colours() -> None:
    colours = np.full((1, 1, 3), 100, np.uint8)
    colours[..., 0] = 140  # red turns towards yellow
    turned = augmentation(hue=0.5).recolour(colours, drawn(turn=pi / 6))[0, 0].astype(int)
    assert turned[1] - turned[2] > 5


def test_without_strengths_colours_stay() -> None:
    assert augmentation(horizontal_flip=True).recolour(MIDDLE, drawn(brightness=0.5)) is MIDDLE
    same = augmentation(brightness=1.0).recolour(MIDDLE, drawn())
    np.testing.assert_array_equal(same, MIDDLE)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 9), (31, 32), (64, 64), (300, 200)])
def test_resizing_is_bilinear_or_the_mean(height: int, width: int) -> None:
    pixels = cv2.resize(MIDDLE, (width + 4, height + 4))[2:-2, 2:-2]  # a view
    resized = crop_resized(pixels, 32)
    assert resized.shape == (32, 32, 3)
    if (height, width) == (64, 64):
        mean = pixels.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(resized - mean).max() <= 0.5
    else:
        box = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.abs(resized.astype(int) - np.asarray(box)).mean() < 3


def test_channels_move_there_and_back() -> None:
    image = channels_first(MIDDLE)
    np.testing.assert_array_equal(image, MIDDLE.transpose(2, 0, 1))
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(channels_last(image), MIDDLE)


@given(st.integers(1, 500), st.integers(1, 60), st.data())
def test_a_scaled_box_covers_the_same_part(old: int, new: int, data: st.DataObject) -> None:
    top = data.draw(st.integers(0, old - 1))
    height = data.draw(st.integers(1, old - top))
    box = Box(top, 0, height, 7).scaled((old, 7), (new, 7))
    assert (box.left, box.width) == (0, 7)
    assert 0 <= box.top < box.top + box.height <= new
    # Half a pixel of rounding, and where nothing would be left, one more.
    assert abs(box.top - top * new / old) <= 1
    assert abs(box.top + box.height - (top + height) * new / old) <= 1.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop": "centre"}, "crop"),
        ({"crop": "inception", "crop_area": (0.0, 1.0)}, "crop_area"),
        ({"crop": "inception", "crop_area": (0.1, 1.1)}, "crop_area"),
        ({"crop": "inception", "crop_area": (0.9, 0.1)}, r"\[0.9, 0.1\].*write \[0.1, 0.9\]"),
        ({"crop": "inception", "crop_ratio": (2.0, 1.0)}, "wrong way round"),
        ({"crop": "inception", "crop_ratio": (1.0, float("inf"))}, "crop_ratio"),
        ({"crop": "inception", "crop_ratio": (float("nan"), 1.0)}, "crop_ratio"),
        ({"crop_area": (0.5, 1.0)}, "no effect"),
        ({"crop_ratio": (1.0, 1.0)}, "no effect"),
        ({"brightness": 1.1}, "brightness"),
        ({"contrast": -0.1}, "contrast"),
        ({"saturation": float("nan")}, "saturation"),
        ({"hue": 0.6}, "hue"),
    ],
)
def test_senseless_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AugmentSettings(**values)


def test_settings_survive_being_written_down() -> None:
    for settings_ in (AugmentSettings(), AugmentSettings(crop="inception", crop_area=(0.5, 1))):
        assert AugmentSettings.model_validate(settings_.model_dump(mode="json")) == settings_
