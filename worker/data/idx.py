"""Grey images in idx files, as MNIST and the sets made after it have them.

A file is big-endian: a magic number, the length of each axis as uint32, then the values. Images
are idx3 (N, H, W) and labels idx1 (N,), both uint8, in two files whose names tell them apart:
`train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, each with `.gz` or without.
"""

import gzip
import hashlib
import math
import os
import re
import struct
import zlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from model.errors import InputError
from worker.data.source import KnownLabels, Sample

_NAME = re.compile(r"(images|labels)([-.])idx[0-9]-ubyte(\.gz)?$")
_IMAGES = 3
_LABELS = 1
_MAGIC_UINT8 = 0x0800
"""Of values that are uint8; the number of axes is added to it."""
_MAX_DEFLATE_RATIO = 1032
"""A byte that is compressed with deflate can't stand for more bytes than this."""

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_FASHION_MNIST_LABELS = frozenset(
    (
        "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
        "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    )
)
"""SHA-256 of the labels of its training and test images: the names of files prove nothing."""


def is_idx(path: str) -> bool:
    """Whether a path is named as idx files are."""
    return _NAME.search(os.path.basename(path)) is not None


class IdxSource:
    """The images of one idx file, held in memory as uint8, with the labels of its partner.

    path: the file of images; the labels lie beside it under the same name, with `labels` for
    `images`, compressed or not.
    Raises InputError when either is missing, damaged or of another kind, or counts differ.
    """

    def __init__(self, path: str) -> None:
        self._name = os.path.basename(path)
        labels_path = _partner(path)
        self._images = _read_idx(path, _IMAGES)
        self._labels = _read_idx(labels_path, _LABELS)
        if len(self._images) != len(self._labels):
            raise InputError(
                f"{path}: has {len(self._images)} images, but {labels_path} has "
                f"{len(self._labels)} labels: put files beside each other that belong together"
            )
        if 0 in self._images.shape:
            raise InputError(
                f"{path}: has {' x '.join(map(str, self._images.shape))} pixels, so there is "
                "nothing to train on: name a file that has images"
            )
        digest = hashlib.sha256(self._labels.tobytes()).hexdigest()
        self._is_fashion_mnist = digest in _FASHION_MNIST_LABELS

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return (len(self._images),)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Those of Fashion-MNIST, whose labels are known; files of others hold no names."""
        return FASHION_MNIST_CLASSES if self._is_fashion_mnist else None

    @property
    def cached_shards(self) -> None:
        return None

    @property
    def known_labels(self) -> KnownLabels:
        num_names = len(self.class_names or ())
        return KnownLabels(np.bincount(self._labels, minlength=num_names), fewest=1, most=1)

    @property
    def fetches(self) -> bool:
        return False

    def announce(self, shards: Sequence[int]) -> None:
        pass

    def labels(self, shard: int, index: int) -> tuple[int, ...]:
        assert shard == 0
        return (int(self._labels[index]),)

    def read(self, shard: int, index: int) -> Sample:
        """The sample, its grey pixels repeated for red, green and blue."""
        assert shard == 0
        rgb = np.repeat(self._images[index][:, :, np.newaxis], 3, axis=2)
        return Sample(f"{self._name}[{index}]", rgb, self.labels(shard, index))


def _partner(path: str) -> str:
    """The file of labels that belongs to a file of images."""
    folder, name = os.path.split(path)
    match = _NAME.search(name)
    if match is None or match[1] != "images":
        raise InputError(
            f"{path}: is not named as idx files of images are: name one like "
            "train-images-idx3-ubyte.gz, whose labels are found beside it"
        )
    plain = os.path.join(folder, f"{name[: match.start()]}labels{match[2]}idx1-ubyte")
    for candidate in (plain + (match[3] or ""), plain + ".gz", plain):
        if os.path.exists(candidate):
            return candidate
    if not os.path.exists(path):
        raise InputError(f"{path}: does not exist: name an idx file of images")
    raise InputError(f"{path}: its labels are missing: put {plain} or {plain}.gz beside it")


def _read_idx(path: str, num_axes: int) -> NDArray[np.uint8]:
    try:
        num_bytes = os.path.getsize(path)
        opened = gzip.open(path) if path.endswith(".gz") else open(path, "rb")  # noqa: SIM115
        with opened as file:
            limit = num_bytes * (_MAX_DEFLATE_RATIO if path.endswith(".gz") else 1)
            return _parse(path, file, num_axes, limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read, check that it exists everywhere ({error.strerror})"
        ) from None


def _parse(
    path: str, file: BinaryIO | gzip.GzipFile, num_axes: int, limit: int
) -> NDArray[np.uint8]:
    """limit: bytes that the file can hold at most, so that a damaged head costs no memory."""
    magic = _MAGIC_UINT8 + num_axes
    head = file.read(4 * (1 + num_axes))
    if head[:4] != struct.pack(">I", magic):
        raise InputError(
            f"{path}: starts with 0x{head[:4].hex()} where an idx file of {num_axes} axes of "
            f"uint8 has 0x{magic:08x}: name files as MNIST has them"
        )
    if len(head) < 4 * (1 + num_axes):
        raise _damaged(path, "it ends within its head")
    shape = struct.unpack(f">{num_axes}I", head[4:])
    size = math.prod(shape)
    if size > limit:
        raise _damaged(path, f"it is too short for the {size} values that its head announces")
    values = np.empty(size, np.uint8)
    num_read = _read_into(file, values.data)
    if num_read < size:
        raise _damaged(path, f"it ends after {num_read} of {size} values")
    if file.read(1):  # which also makes gzip compare its checksum
        raise _damaged(path, f"it goes on after the {size} values that its head announces")
    try:
        return values.reshape(shape)
    except ValueError as error:  # one side is 0, and the others are more than NumPy can count
        raise _damaged(path, f"{error}: {' x '.join(map(str, shape))}") from None


def _read_into(file: BinaryIO | gzip.GzipFile, buffer: memoryview) -> int:
    """Fill the buffer as far as the file goes; returns the bytes read."""
    num_read = 0
    while num_read < len(buffer) and (chunk := file.read(min(1 << 20, len(buffer) - num_read))):
        buffer[num_read : num_read + len(chunk)] = chunk
        num_read += len(chunk)
    return num_read


def _damaged(path: str, reason: str) -> InputError:
    return InputError(f"{path}: is truncated or damaged ({reason}): fetch it again")
