import io
import os
from contextlib import suppress
from math import ceil
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from worker.data.decode import CorruptImage, open_image
from worker.data.transform import AugmentSettings, Transform

LIMIT = 10**9


def picture(height: int, width: int) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    resized = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def jpeg(pixels: NDArray[np.uint8], mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_pillow(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


VARIANTS: dict[str, dict[str, Any]] = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "rgb": {"keep_rgb": True},
    "restart markers": {"restart_marker_blocks": 3},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (37, 50), (64, 33)])
def test_a_jpeg_is_what_pillow_makes_of_it(
    options: dict[str, Any], height: int, width: int
) -> None:
    content = jpeg(picture(height, width), quality=90, **options)
    image = open_image(content, LIMIT)
    assert (image.height, image.width) == (height, width)
    np.testing.assert_array_equal(image.rgb(), by_pillow(content))


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 90), st.integers(8, 90), st.floats(1.0, 12.0))
def test_a_jpeg_shrinks_as_far_as_is_allowed(height: int, width: int, shrink: float) -> None:
    content = jpeg(picture(height, width), quality=95)
    pixels = open_image(content, LIMIT).rgb(shrink)
    if shrink < 2:
        assert pixels.shape == (height, width, 3)
        return
    assert pixels.shape[0] >= ceil(height / shrink - 1e-9)
    assert pixels.shape[1] >= ceil(width / shrink - 1e-9)
    assert pixels.shape[0] <= ceil(height / 2)
    assert pixels.shape[1] <= ceil(width / 2)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_shrunk_jpeg_looks_the_same(factor: int) -> None:
    pixels = picture(160, 240)
    shrunk = open_image(jpeg(pixels, quality=95), LIMIT).rgb(factor)
    expected = Image.fromarray(pixels).reduce(factor)
    assert shrunk.shape == np.asarray(expected).shape
    assert np.abs(shrunk.astype(int) - np.asarray(expected)).mean() < 2


def test_other_content_does_not_shrink() -> None:
    pixels = picture(60, 80)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    for content in (buffer.getvalue(), pixels, jpeg(pixels, "CMYK")):
        assert open_image(content, LIMIT).rgb(8.0).shape == pixels.shape


def test_pixels_are_passed_through() -> None:
    pixels = picture(6, 8)
    image = open_image(pixels, LIMIT)
    assert (image.height, image.width) == (6, 8)
    assert image.rgb() is pixels


CONTENT = jpeg(picture(40, 60), quality=90)
_SCAN = CONTENT.index(b"\xff\xda")


@pytest.mark.parametrize(
    "content",
    [picture(40, 60), CONTENT, CONTENT[: _SCAN + 20], jpeg(picture(40, 60), "CMYK")[:-200]],
    ids=["pixels", "jpeg", "jpeg without pixels", "cmyk without the end"],
)
def test_size_is_known_before_decoding(content: bytes | NDArray[np.uint8]) -> None:
    assert open_image(content, 2400).width == 60
    with pytest.raises(CorruptImage, match="60 x 40 pixels are too many"):
        open_image(content, 2399)


def test_pillows_own_limit_stays() -> None:
    start = CONTENT.index(b"\xff\xc0") + 5
    claimed = b"".join(side.to_bytes(2, "big") for side in (13_400, 13_400))
    bomb = CONTENT[:start] + claimed + CONTENT[start + 4 :]
    with pytest.raises(CorruptImage, match="13400 x 13400 pixels are too many"):
        open_image(bomb, 10**12)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(deadline=None, max_examples=300)
@given(st.data(), st.sampled_from([1.0, 3.0]))
def test_what_pillow_still_reads_of_a_damaged_jpeg_is_read(
    data: st.DataObject, shrink: float
) -> None:
    damaged = bytearray(CONTENT)
    places = st.one_of(st.integers(0, len(CONTENT) - 1), st.integers(0, _SCAN + 40))
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        damaged[place] = data.draw(st.integers(0, 255))
    content = bytes(damaged[: data.draw(st.integers(0, 30)) or None])
    try:
        expected = by_pillow(content)
    except Exception:  # whatever Pillow raises: then ours may do as it likes, within its contract
        expected = None
    if expected is not None:
        assume(len(expected) * len(expected[0]) <= 10**6)
        pixels = open_image(content, 10**6).rgb(shrink)
        if shrink == 1:
            np.testing.assert_array_equal(pixels, expected)
    else:
        with suppress(CorruptImage):
            open_image(content, 10**6).rgb(shrink)


def test_a_truncated_jpeg_is_corrupt_at_every_size() -> None:
    content = jpeg(picture(300, 400), quality=90)
    for shrink in (1.0, 2.0, 4.0, 8.0):
        image = open_image(content[: len(content) // 2], LIMIT)
        with pytest.raises(CorruptImage, match="truncated"):
            image.rgb(shrink)


def test_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    pixels = picture(20, 30)
    content = jpeg(pixels, exif=exif)
    assert Image.open(io.BytesIO(content)).getexif()[0x0112] == 6
    assert open_image(content, LIMIT).rgb().shape == (20, 30, 3)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts Linux's threads")
def test_no_library_starts_threads() -> None:
    augment = AugmentSettings(crop="inception", brightness=0.2, horizontal_flip=True)
    transform = Transform(1200, 0, augment)
    content = jpeg(picture(1500, 2000))
    before = set(os.listdir("/proc/self/task"))
    for position in range(4):
        transform.load(content, position)
    assert set(os.listdir("/proc/self/task")) <= before  # those of other tests may end meanwhile
    assert cv2.getNumThreads() == 1
