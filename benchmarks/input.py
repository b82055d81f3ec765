"""Images a second from JPEG to training crop: our loader against torch's DataLoader with Pillow.

Both read the same tar, of 500 x 375 JPEGs made when the benchmark starts: smooth noise at five
scales with edges on top, quality 90 and 4:2:0, which takes 51 to 54 KB as a photo would. Both make
the same Inception-style crops of them, mirrored or not, with the same brightness, contrast and
saturation, drawn in the same way, and hand over batches of uint8 (N, 3, 299, 299). Ours is a
`BatchLoader` with decoding threads; theirs a `DataLoader` with as many processes, a data set that
opens, converts, crops, resizes (bilinear), mirrors and enhances with Pillow, and the usual
collation. All threads and processes of a contender are bound to the same number of cores.

One thing differs: Pillow smooths where it shrinks, and OpenCV's bilinear does not up to a factor
of two. `ours, smoothed` says what that is worth: ours with Pillow's resize in place of OpenCV's.

A round runs every contender once, each round starting with another; what is reported are medians
with the quartiles, and medians of the ratios within a round. CPU time is that of all threads and
processes of a contender. `breakdown` says where the time of one image goes, and `wait` which share
of a training step waits for data. Prints one line `RESULT {json}` for each row.
"""

import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.flat import FlatModule
from model.registry import create_model
from ps.malloc import tune_malloc
from worker.data.augment import (
    Augmentation,
    AugmentSettings,
    Box,
    Draw,
    channels_first,
    crop_resized,
)
from worker.data.decode import open_image
from worker.data.lease import Lease
from worker.data.loader import Batch, BatchLoader
from worker.data.order import EpochOrder
from worker.data.transform import Transform
from worker.data.webdataset import WebDatasetSource
from worker.gradient import GradientComputer
from worker.objective import create_objective

HEIGHT, WIDTH, SIZE = 375, 500, 299
SEED, NUM_CLASSES = 1, 1000
AUGMENT = AugmentSettings(
    horizontal_flip=True, crop="inception", brightness=0.4, contrast=0.4, saturation=0.4
)
AUGMENTATION = Augmentation(AUGMENT, SIZE, SEED)
OURS, SMOOTHED, THEIRS = "ours", "ours, smoothed", "torch DataLoader, Pillow"
_NOISE = ((4, 60), (12, 40), (40, 25), (120, 12), (400, 5))
"""(waves across the image, amplitude), about as a photo's spectrum falls."""

Contender = Callable[[int], None]
"""Makes all batches of so many images."""
Row = dict[str, Any]
Taken = tuple[float, float]
"""Seconds, and CPU seconds, for an image."""


def _photo(number: int) -> Image.Image:
    generator = np.random.default_rng(number)
    pixels = np.full((HEIGHT, WIDTH, 3), 128.0)
    for waves, amplitude in _NOISE:
        noise = generator.standard_normal((waves * HEIGHT // WIDTH + 1, waves, 3))
        # Mostly the same in all channels: photos are mostly grey.
        noise = 1.2 * noise.mean(axis=2, keepdims=True) + 0.3 * noise
        pixels += amplitude * cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for _ in range(12):
        across, down, offset = generator.standard_normal(3)
        side = across * (x - WIDTH / 2) + down * (y - HEIGHT / 2) > 0.2 * WIDTH * offset
        centre = generator.uniform(0, (WIDTH, HEIGHT))
        near = np.hypot(x - centre[0], y - centre[1]) < generator.uniform(30, 150)
        pixels[side & near] += generator.normal(0, 35, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _write_tar(path: Path, num_images: int) -> list[int]:
    """Returns the bytes of each image."""
    sizes = []
    with tarfile.open(path, "w") as tar:
        for number in range(num_images):
            buffer = io.BytesIO()
            _photo(number).save(buffer, "JPEG", quality=90)
            label = str(number % NUM_CLASSES).encode()
            for suffix, content in ((".jpg", buffer.getvalue()), (".cls", label)):
                member = tarfile.TarInfo(f"{number:06}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            sizes.append(len(buffer.getvalue()))
    return sizes


class _PillowImages(Dataset[tuple[Tensor, int]]):
    """What a plain training script has, with crops and colours drawn as ours are."""

    def __init__(self, source: WebDatasetSource, order: EpochOrder, num_images: int) -> None:
        self._source, self._order, self._num_images = source, order, num_images

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        ((shard, number),) = self._order.locate(position, position + 1)
        sample = self._source.read(shard, number)
        assert isinstance(sample.image, bytes)
        draw = AUGMENTATION.draw(position)
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        box = AUGMENTATION.crop(draw, image.height, image.width)
        return _tensor(_enhanced(_cropped(image, box), draw)), sample.labels[0]


def _tensor(image: Image.Image) -> Tensor:
    """As torchvision's pil_to_tensor."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _cropped(image: Image.Image, box: Box) -> Image.Image:
    """Resized from the box itself, which spares a copy of it."""
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, corners)


def _enhanced(image: Image.Image, draw: Draw) -> Image.Image:
    if draw.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageEnhance.Brightness(image).enhance(draw.brightness)
    image = ImageEnhance.Contrast(image).enhance(draw.contrast)
    return ImageEnhance.Color(image).enhance(draw.saturation)


class _Smoothed(Transform):
    """Ours with Pillow's resize."""

    def load(self, content: bytes | NDArray[np.uint8], position: int) -> NDArray[np.uint8]:
        image = open_image(content, 10**8)
        draw = AUGMENTATION.draw(position)
        box = AUGMENTATION.crop(draw, image.height, image.width)
        square = np.asarray(_cropped(Image.fromarray(image.rgb()), box))
        return AUGMENTATION.move(channels_first(AUGMENTATION.recolour(square, draw)), draw)


class _Set:
    """The images, and who loads them."""

    def __init__(self, path: Path, batch_size: int) -> None:
        self.source = WebDatasetSource([str(path)])
        self.order = EpochOrder(self.source.shard_sizes, SEED, shuffle_window=10**6)
        self.batch_size = batch_size

    def loader(self, num_threads: int, transform: Transform | None = None) -> BatchLoader:
        return BatchLoader(
            self.source,
            self.order,
            transform or Transform(SIZE, SEED, AUGMENT),
            batch_size=self.batch_size,
            num_threads=num_threads,
        )

    def ours(self, num_threads: int, transform: Transform | None = None) -> Contender:
        loader = self.loader(num_threads, transform)

        def run(num_images: int) -> None:
            batches = loader.batches([Lease(0, num_images)])
            assert sum(len(batch.images) for batch in batches) == num_images

        return run

    def theirs(self, num_processes: int, num_images: int) -> Contender:
        loader = DataLoader(
            _PillowImages(self.source, self.order, num_images),
            batch_size=self.batch_size,
            num_workers=num_processes,
            persistent_workers=True,
            prefetch_factor=4,
            multiprocessing_context="fork",
        )

        def run(num_images: int) -> None:
            assert sum(len(images) for images, _ in loader) == num_images

        return run


def _cpu_s() -> float:
    """CPU time of this process and of those that it started."""
    processes = psutil.Process().children(recursive=True)
    times = [process.cpu_times() for process in processes]
    return time.process_time() + sum(each.user + each.system for each in times)


def _speed(
    images: _Set, cores: Sequence[int], num_images: int, num_rounds: int
) -> dict[tuple[str, int], list[Taken]]:
    """Every round, by contender and cores."""
    contenders: dict[tuple[str, int], Contender] = {}
    for count in range(1, len(cores) + 1):
        os.sched_setaffinity(0, cores[:count])  # what is forked from here keeps it
        contenders[OURS, count] = images.ours(count)
        contenders[THEIRS, count] = images.theirs(count, num_images)
        contenders[THEIRS, count](num_images)
    contenders[SMOOTHED, 1] = images.ours(1, _Smoothed(SIZE, SEED, AUGMENT))
    found: dict[tuple[str, int], list[Taken]] = defaultdict(list)
    keys = list(contenders)
    for number in range(1 + num_rounds):
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            os.sched_setaffinity(0, cores[: key[1]])
            start_s, start_cpu_s = time.perf_counter(), _cpu_s()
            contenders[key](num_images)
            taken = time.perf_counter() - start_s, _cpu_s() - start_cpu_s
            if number:  # the first warms up
                found[key].append((taken[0] / num_images, taken[1] / num_images))
    os.sched_setaffinity(0, cores)
    return found


def _speed_rows(found: Mapping[tuple[str, int], list[Taken]]) -> Iterator[Row]:
    for (name, count), values in sorted(found.items()):
        low, median, high = _quartiles([1 / wall_s for wall_s, _ in values])
        base, one = found[THEIRS, count], found[name, 1]
        yield {
            "what": "images per second",
            "contender": name,
            "cores": count,
            "median": round(median),
            "quartiles": [round(low), round(high)],
            "cpu_ms_per_image": round(1e3 * statistics.median(cpu_s for _, cpu_s in values), 3),
            "x_theirs": _ratio(base, values, 0),
            "x_theirs_by_cpu_time": _ratio(base, values, 1),
            "x_one_core": _ratio(one, values, 0),
        }


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _ratio(values: Sequence[Taken], base: Sequence[Taken], which: int) -> float:
    ratios = (v[which] / b[which] for v, b in zip(values, base, strict=True))
    return round(statistics.median(ratios), 2)


# Where the time of one image goes


def _stages(images: _Set, position: int) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(contender, stage, a call that does it) for the image at a position."""
    ((shard, index),) = images.order.locate(position, position + 1)
    content = images.source.read(shard, index).image
    assert isinstance(content, bytes)
    box = AUGMENTATION.crop(draw := AUGMENTATION.draw(position), HEIGHT, WIDTH)
    pixels = open_image(content, 10**8).rgb()
    square = crop_resized(box.of(pixels), SIZE)
    planes, slot = channels_first(square), np.empty((3, SIZE, SIZE), np.uint8)
    yield OURS, "read", lambda: images.source.read(shard, index)
    yield OURS, "draw", lambda: AUGMENTATION.crop(AUGMENTATION.draw(position), HEIGHT, WIDTH)
    yield OURS, "decode", lambda: open_image(content, 10**8).rgb()
    yield OURS, "crop and resize", lambda: crop_resized(box.of(pixels), SIZE)
    yield OURS, "colour", lambda: AUGMENTATION.recolour(square, draw)
    yield OURS, "layout and flip", lambda: AUGMENTATION.move(channels_first(square), draw)
    yield OURS, "into the batch", lambda: np.copyto(slot, planes)
    yield OURS, "whole image", lambda: Transform(SIZE, SEED, AUGMENT).load(content, position)
    whole = Image.fromarray(pixels)
    resized = _cropped(whole, box)
    plain = _PillowImages(images.source, images.order, position + 1)
    yield THEIRS, "decode", lambda: Image.open(io.BytesIO(content)).convert("RGB")
    yield THEIRS, "crop and resize", lambda: _cropped(whole, box)
    yield THEIRS, "colour and flip", lambda: _enhanced(resized, draw)
    yield THEIRS, "layout", lambda: _tensor(resized)
    yield THEIRS, "whole image", lambda: plain[position]


def _breakdown_rows(images: _Set, num_images: int, num_rounds: int) -> Iterator[Row]:
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(num_rounds):
        for position in range(num_images):
            for name, stage, call in _stages(images, position):
                start_s = time.thread_time()
                call()
                seconds[name, stage].append(time.thread_time() - start_s)
    for (name, stage), values in seconds.items():
        yield {
            "what": "cpu ms of one image",
            "contender": name,
            "stage": stage,
            "median": round(1e3 * statistics.median(values), 3),
            "quartiles": [round(1e3 * value, 3) for value in _quartiles(values)[::2]],
        }


# What a training step waits


def _waits(images: _Set, num_steps: int, step: Callable[[Batch], None]) -> tuple[Taken, float]:
    """Seconds that all steps but the first waited and took; seconds of the first wait.

    Times are taken as in `WorkerLoop.run`.
    """
    data_s, step_s = [], []
    since_s = time.perf_counter()
    for batch in images.loader(1).batches([Lease(0, (1 + num_steps) * images.batch_size)]):
        got_s = time.perf_counter()
        step(batch)
        data_s.append(got_s - since_s)
        since_s = time.perf_counter()
        step_s.append(since_s - got_s)
    return (sum(data_s[1:]), sum(step_s[1:])), data_s[0]


def _xception_step() -> Callable[[Batch], None]:
    """A worker's step on the CPU, in one thread."""
    flat = FlatModule(create_model("xception", NUM_CLASSES, width=0.25).train())
    computer = GradientComputer(flat, create_objective("multilabel", NUM_CLASSES), None)

    def step(batch: Batch) -> None:
        computer.compute(batch)

    return step


def _sleep_step(length_s: float) -> Callable[[Batch], None]:
    """As on a GPU: the cores have nothing to do meanwhile."""
    return lambda _: time.sleep(length_s)


def _wait_rows(images: _Set, num_steps: int) -> Iterator[Row]:
    """One thread decodes, beside the one that steps."""
    taken = []
    for _ in range(5):
        start_s = time.perf_counter()
        images.ours(1)(images.batch_size)
        taken.append(time.perf_counter() - start_s)
    decode_s = statistics.median(taken)
    steps = {"xception, width 0.25": _xception_step()}
    for slack in (1.1, 1.5, 2.0):
        steps[f"asleep for {slack} x the decoding of a batch"] = _sleep_step(slack * decode_s)
    for name, step in steps.items():
        (waited_s, stepped_s), first_s = _waits(images, num_steps, step)
        yield {
            "what": "share of a step that waits for data",
            "step": name,
            "step_ms": round(1e3 * stepped_s / num_steps, 1),
            "decode_ms": round(1e3 * decode_s, 1),
            "share": round(waited_s / (waited_s + stepped_s), 4),
            "first_wait_ms": round(1e3 * first_s, 1),
        }


@click.command()
@click.argument("what", type=click.Choice(["speed", "breakdown", "wait"]), default="speed")
@click.option("--images", "num_images", default=512, show_default=True, help="Of a round.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=9, show_default=True, help="Rounds that are counted.")
@click.option("--cores", default=2, show_default=True, help="The most to be used at once.")
@click.option("--steps", default=20, show_default=True, help="Of `wait`.")
def main(what: str, num_images: int, batch_size: int, rounds: int, cores: int, steps: int) -> None:
    """Time the input pipeline, break one image's time down, or see what a step waits."""
    torch.set_num_threads(1)
    tune_malloc()  # as a worker does
    usable = sorted(os.sched_getaffinity(0))[:cores]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photos.tar"
        sizes = _write_tar(path, num_images)
        _print({"what": "jpeg bytes", "quartiles": [round(value) for value in _quartiles(sizes)]})
        images = _Set(path, batch_size)
        rows = {
            "speed": lambda: _speed_rows(_speed(images, usable, num_images, rounds)),
            "breakdown": lambda: _breakdown_rows(images, min(num_images, 64), rounds),
            "wait": lambda: _wait_rows(images, steps),
        }
        for row in rows[what]():
            _print(row)


def _print(row: Row) -> None:
    print("RESULT", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
