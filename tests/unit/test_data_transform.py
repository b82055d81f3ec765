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

from worker.data.transform import AugmentSettings, CorruptImage, Transform, normalize

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
