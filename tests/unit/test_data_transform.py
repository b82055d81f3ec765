import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from worker.data.seeding import AUGMENT, random_words
from worker.data.transform import (
    AugmentSettings,
    CorruptImage,
    ResizeSettings,
    Transform,
    normalize,
)

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]


def encoded(image: Image.Image, format_name: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def decoded(content: bytes, size: int = 9) -> NDArray[np.uint8]:
    return Transform(size).decode(content)


def channels_first(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.moveaxis(image, -1, 0)


def three(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([grey] * 3)


def on_white(colour: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    share = alpha / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("format_name", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(format_name: str) -> None:
    image = decoded(encoded(Image.fromarray(RGB), format_name))
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, channels_first(RGB))
    grey = decoded(encoded(Image.fromarray(GREY), format_name))
    np.testing.assert_array_equal(grey, three(GREY))


@pytest.mark.parametrize(("format_name", "quality"), [("JPEG", 95), ("WEBP", 95)])
def test_lossy_formats_come_close(format_name: str, quality: int) -> None:
    smooth = np.add.outer(np.arange(9), np.arange(9)).astype(np.uint8) * 10
    image = decoded(encoded(Image.fromarray(smooth).convert("RGB"), format_name, quality=quality))
    assert np.abs(image.astype(int) - three(smooth)).max() <= 12


def test_palettes_and_bits() -> None:
    palette = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decoded(encoded(palette)), channels_first(expected))
    bits = GREY > 128
    expected_bits = three(np.where(bits, 255, 0).astype(np.uint8))
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(bits))), expected_bits)


def test_alpha_shows_white() -> None:
    alpha = RNG.integers(0, 256, (9, 9), dtype=np.uint8)
    rgba = Image.fromarray(np.dstack([RGB, alpha]))
    expected = channels_first(on_white(RGB, alpha[:, :, None]).round().astype(np.uint8))
    assert np.abs(decoded(encoded(rgba)).astype(int) - expected).max() <= 1
    grey_alpha = Image.fromarray(GREY).convert("LA")
    grey_alpha.putalpha(Image.fromarray(alpha))
    expected = three(on_white(GREY, alpha).round().astype(np.uint8))
    assert np.abs(decoded(encoded(grey_alpha)).astype(int) - expected).max() <= 1


def test_transparent_palette_entries_and_colours_show_white() -> None:
    palette = Image.fromarray(RGB).quantize(4)
    entries = np.asarray(palette)
    shown = np.asarray(palette.convert("RGB"))
    expected = np.where((entries == 2)[:, :, None], 255, shown)
    content = encoded(palette, transparency=2)
    np.testing.assert_array_equal(decoded(content), channels_first(expected.astype(np.uint8)))

    levels = GREY // 64
    content = encoded(Image.fromarray(levels), transparency=2)
    np.testing.assert_array_equal(
        decoded(content), three(np.where(levels == 2, 255, levels).astype(np.uint8))
    )


def test_sixteen_bits_keep_the_upper_byte() -> None:
    deep = RNG.integers(0, 2**16, (9, 9), dtype=np.uint16)
    for format_name in ("PNG", "TIFF"):
        image = decoded(encoded(Image.fromarray(deep), format_name))
        np.testing.assert_array_equal(image, three((deep >> 8).astype(np.uint8)))


def test_cmyk() -> None:
    smooth = np.full((9, 9, 3), (200, 100, 50), np.uint8)
    cmyk = Image.fromarray(smooth).convert("CMYK")
    image = decoded(encoded(cmyk, "JPEG", quality=95))
    assert np.abs(image.astype(int) - channels_first(smooth)).max() <= 6


def test_resizes_to_a_square() -> None:
    halves = np.zeros((10, 40, 3), np.uint8)
    halves[:, 20:] = (255, 128, 0)
    image = decoded(encoded(Image.fromarray(halves)), size=8)
    assert image.shape == (3, 8, 8)
    assert (image[:, :, :3] == 0).all()
    assert (image[:, :, 5:] == np.array([255, 128, 0])[:, None, None]).all()


VALID = [
    encoded(Image.fromarray(RGB)),
    encoded(Image.fromarray(RGB), "JPEG"),
    encoded(Image.fromarray(RGB), "WEBP", lossless=True),
    encoded(Image.fromarray(RGB), "TIFF", compression="tiff_deflate"),
]


@pytest.mark.parametrize("content", VALID[:2])
def test_every_truncation_is_corrupt(content: bytes) -> None:
    # A PNG's last chunk and checksums and a JPEG's last marker hold no pixels.
    for length in range(len(content) - 20):
        with pytest.raises(CorruptImage):
            decoded(content[:length])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(VALID), st.data())
def test_damage_decodes_or_is_corrupt(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content)
    places = st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        image = decoded(bytes(damaged))
    except CorruptImage:
        return
    assert image.shape == (3, 9, 9)


@pytest.mark.parametrize("content", [b"", b"not an image", encoded(Image.fromarray(RGB), "PCX")])
def test_other_bytes_are_corrupt(content: bytes) -> None:
    with pytest.raises(CorruptImage):
        decoded(content)


def test_floating_point_pixels_are_refused() -> None:
    content = encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF")
    with pytest.raises(CorruptImage, match="floating-point"):
        decoded(content)


def test_too_many_pixels_are_refused() -> None:
    content = encoded(Image.fromarray(RGB))
    assert Transform(4, max_pixels=81).decode(content).shape == (3, 4, 4)
    with pytest.raises(CorruptImage, match="9 x 9 pixels"):
        Transform(4, max_pixels=80).decode(content)


IMAGE = channels_first(RGB)


def test_evaluation_changes_nothing() -> None:
    transform = Transform(9)
    for position in range(20):
        np.testing.assert_array_equal(transform.augment(IMAGE, position), IMAGE)


def test_half_of_the_images_are_mirrored() -> None:
    transform = Transform(9, 1, AugmentSettings(horizontal_flip=True))
    mirrored = 0
    for position in range(1000):
        image = transform.augment(IMAGE, position)
        if not np.array_equal(image, IMAGE):
            np.testing.assert_array_equal(image, IMAGE[:, :, ::-1])
            mirrored += 1
    assert 400 < mirrored < 600


def test_shifts_cover_their_range_and_repeat_the_edge() -> None:
    transform = Transform(9, 1, AugmentSettings(max_shift=0.23))  # 2 pixels
    padded = np.pad(IMAGE, ((0, 0), (2, 2), (2, 2)), mode="edge")
    crops = {padded[:, y : y + 9, x : x + 9].tobytes(): (y, x) for y in range(5) for x in range(5)}
    found = {crops[transform.augment(IMAGE, p).tobytes()] for p in range(1000)}
    assert len(found) == 25


@given(st.integers(0, 2**62), st.integers(0, 2**31))
@settings(max_examples=30)
def test_augmentation_is_a_function_of_seed_and_position(position: int, seed: int) -> None:
    augment = AugmentSettings(horizontal_flip=True, max_shift=0.4)
    before = IMAGE.copy()
    images = [Transform(9, seed, augment).augment(IMAGE, position) for _ in range(2)]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(IMAGE, before)
    seeds = {Transform(9, seed + i, augment).augment(IMAGE, position).tobytes() for i in range(9)}
    positions = {
        Transform(9, seed, augment).augment(IMAGE, position + i).tobytes() for i in range(9)
    }
    assert min(len(seeds), len(positions)) > 1


@pytest.mark.parametrize("max_shift", [-0.1, 0.6, float("nan")])
def test_shifts_that_leave_no_image_are_refused(max_shift: float) -> None:
    with pytest.raises(ValidationError, match="max_shift"):
        AugmentSettings(max_shift=max_shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalize_rounds_once(dtype: torch.dtype) -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    expected = (pixels.double() / 127.5 - 1).to(dtype)
    torch.testing.assert_close(normalize(pixels, dtype), expected, rtol=0, atol=1e-7)
    assert normalize(pixels, dtype)[[0, 255]].tolist() == [-1.0, 1.0]


def stretched_and_shifted(
    content: bytes, size: int, seed: int, position: int, max_shift: int
) -> NDArray[np.uint8]:
    """What a transform without crop and colours is defined to make of an opaque image."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    square = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    flip, down, right = random_words(3, seed, AUGMENT, position).tolist()
    top, left = ((word % (2 * max_shift + 1)) for word in (down, right))
    padded = np.pad(square, ((max_shift, max_shift), (max_shift, max_shift), (0, 0)), mode="edge")
    top, left = 2 * max_shift - top, 2 * max_shift - left
    shifted = padded[top : top + size, left : left + size]
    return channels_first(shifted[:, ::-1] if flip & 1 else shifted)


sides = st.integers(1, 40)


@settings(deadline=None, max_examples=60)
@given(sides, sides, sides, st.integers(0, 99), st.integers(0, 2**40), st.booleans())
def test_without_crop_and_colours_it_is_pillows_bilinear_stretch(
    height: int, width: int, size: int, seed: int, position: int, as_array: bool
) -> None:
    pixels = np.random.default_rng(position).integers(0, 256, (height, width, 3), dtype=np.uint8)
    png = encoded(Image.fromarray(pixels))
    transform = Transform(size, seed, AugmentSettings(horizontal_flip=True, max_shift=0.2))
    image = transform.load(pixels if as_array else png, position)
    expected = stretched_and_shifted(png, size, seed, position, int(0.2 * size))
    np.testing.assert_array_equal(image, expected)


def test_center_crop_keeps_the_middle() -> None:
    centre = ResizeSettings(mode="center_crop")
    pixels = RNG.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    image = Transform(14, resize=centre).decode(pixels)
    np.testing.assert_array_equal(image, channels_first(pixels[1:15, 5:19]))


def test_center_crop_is_resizing_the_shorter_side_and_cutting() -> None:
    photo = Image.fromarray(smooth_picture(300, 400))
    size, short = 112, 128  # 0.875 of it
    resized = photo.resize((short * 4 // 3, short), Image.Resampling.BILINEAR)
    left, top = (resized.width - size) / 2, (short - size) / 2
    expected = np.asarray(resized.crop((round(left), round(top), round(left) + size, size + 8)))
    image = Transform(size, resize=ResizeSettings(mode="center_crop")).decode(np.asarray(photo))
    assert np.abs(image.astype(int) - channels_first(expected)).mean() < 1.0


def smooth_picture(height: int, width: int) -> NDArray[np.uint8]:
    """Waves of several lengths in each channel, edges aside like a photo."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(17 * x + 5 * y), np.cos(40 * y - 9 * x), np.sin(90 * x * y)]
    picture = 128 + 60 * np.stack(waves, axis=2) + 50 * ((x + y) % 0.5 < 0.2)[:, :, None]
    return picture.clip(0, 255).astype(np.uint8)


EVERYTHING = AugmentSettings(
    horizontal_flip=True,
    max_shift=0.1,
    crop="inception",
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
)
WITHOUT_CROP = EVERYTHING.model_copy(update={"crop": "none"})
SMALL, LARGE = smooth_picture(60, 90), smooth_picture(500, 640)
NOT_SCALED = {
    "pixels": SMALL,
    "large pixels": LARGE,
    "png": encoded(Image.fromarray(LARGE)),
    "jpeg": encoded(Image.fromarray(SMALL), "JPEG", quality=95),
}


@pytest.mark.parametrize("augment", [EVERYTHING, WITHOUT_CROP])
@pytest.mark.parametrize("content", NOT_SCALED.values(), ids=NOT_SCALED)
def test_loading_is_decoding_and_augmenting(
    content: bytes | NDArray[np.uint8], augment: AugmentSettings
) -> None:
    transform = Transform(48, 5, augment)
    decoded = transform.decode(content)
    before = decoded.copy()
    for position in range(20):
        image = transform.load(content, position)
        assert (image.shape, image.dtype) == ((3, 48, 48), np.uint8)
        np.testing.assert_array_equal(image, transform.augment(decoded, position))
    np.testing.assert_array_equal(decoded, before)


@pytest.mark.parametrize("size", [31, 64, 100])
def test_crops_of_a_scaled_jpeg_are_near_those_of_the_whole(size: int) -> None:
    transform = Transform(size, 5, EVERYTHING)
    content = encoded(Image.fromarray(LARGE), "JPEG", quality=95)
    decoded = transform.decode(content)
    num_equal = 0
    for position in range(60):
        scaled = transform.load(content, position)
        whole = transform.augment(decoded, position)
        num_equal += np.array_equal(scaled, whole)
        assert beyond_neighbours(scaled, whole).mean() < 1, position
    assert num_equal < 30, "too few were scaled"


def beyond_neighbours(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How far pixels of (3, S, S) lie outside what `other` has within a pixel of them."""
    padded = np.pad(other, ((0, 0), (1, 1), (1, 1)), mode="edge").astype(int)
    around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    low, high = around.min(axis=(3, 4)), around.max(axis=(3, 4))
    return np.maximum(low - image, image - high).clip(0)


def test_a_scaled_jpeg_is_near_the_whole_one_stretched() -> None:
    content = encoded(Image.fromarray(LARGE), "JPEG", quality=95)
    whole = Transform(100).decode(np.asarray(Image.open(io.BytesIO(content))))
    difference = np.abs(whole.astype(int) - Transform(100).decode(content))
    assert 0 < difference.mean() < 2, "not scaled, or not near"


def test_colours_change_without_a_crop() -> None:
    transform = Transform(9, 1, AugmentSettings(brightness=0.5))
    levels = {
        round(float(transform.load(RGB // 2, p).mean() / (RGB // 2).mean()), 1) for p in range(99)
    }
    assert levels == {step / 10 for step in range(5, 16)}


@pytest.mark.parametrize("position", range(5))
def test_crops_take_no_notice_of_resize(position: int) -> None:
    centre = ResizeSettings(mode="center_crop", crop_fraction=0.5)
    images = [
        Transform(20, 1, EVERYTHING, resize=resize).load(LARGE, position)
        for resize in (None, centre)
    ]
    np.testing.assert_array_equal(*images)


def test_everything_is_a_function_of_seed_and_position() -> None:
    images = [
        [Transform(20, seed, EVERYTHING).load(LARGE, p).tobytes() for p in (7, 3, 7)]
        for seed in (1, 2, 1)
    ]
    assert images[0] == images[2]
    assert images[0][0] == images[0][2]
    assert len({images[0][0], images[0][1], images[1][0]}) == 3


@pytest.mark.parametrize("crop_fraction", [0.0, 1.1, float("nan")])
def test_crop_fractions_that_leave_no_image_are_refused(crop_fraction: float) -> None:
    with pytest.raises(ValidationError, match="crop_fraction"):
        ResizeSettings(crop_fraction=crop_fraction)
