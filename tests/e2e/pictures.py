"""Made-up picture sets: a colour and the direction of stripes decide the labels."""

import io
import itertools
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

COLOURS = tuple(itertools.product((40, 215), repeat=3))
NUM_CLASSES = len(COLOURS) + 2
SIDE = 32

Example = tuple[bytes, list[int]]
"""An encoded image and its labels."""


def multilabel(num_images: int, seed: int) -> Iterator[Example]:
    """Every image carries its colour's label and its stripes' label."""
    for colour, stripes, png in _pictures(num_images, seed):
        yield png, [colour, len(COLOURS) + stripes]


def single_label(num_images: int, seed: int) -> Iterator[Example]:
    """Every image carries its colour's label alone."""
    for colour, _, png in _pictures(num_images, seed):
        yield png, [colour]


def _pictures(num_images: int, seed: int) -> Iterator[tuple[int, int, bytes]]:
    rng = random.Random(seed)
    for _ in range(num_images):
        colour, stripes = rng.randrange(len(COLOURS)), rng.randrange(2)
        yield colour, stripes, _png(COLOURS[colour], stripes, rng)


def _png(colour: Sequence[int], stripes: int, rng: random.Random) -> bytes:
    image = Image.new("RGB", (SIDE, SIDE))
    dark = tuple(channel // 2 for channel in colour)
    for x, y in itertools.product(range(SIDE), repeat=2):
        image.putpixel((x, y), dark if (x, y)[stripes] // 4 % 2 else tuple(colour))
    grain = Image.frombytes("RGB", image.size, rng.randbytes(3 * SIDE * SIDE))
    file = io.BytesIO()
    Image.blend(image, grain, 0.4).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, split: str, examples: Sequence[Example], num_shards: int) -> None:
    """Write `split-00000.tar`, ... with the examples dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{split}-{shard:05d}.tar", "w") as tar:
            for index in range(shard, len(examples), num_shards):
                image, labels = examples[index]
                _add(tar, f"{index:05d}.png", image)
                _add(tar, f"{index:05d}.json", json.dumps({"labels": labels}).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
