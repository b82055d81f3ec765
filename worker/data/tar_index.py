"""Where the samples of one WebDataset shard lie: one pass over its members.

Layout: https://github.com/webdataset/webdataset (members that share a key form a sample).
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from model.errors import InputError
from worker.data.source import IMAGE_SUFFIXES

_BLOCK_BYTES = 512
_ID_LIMIT = 2**31
_DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError)
"""What reading a damaged tar raises; the last two where a header announces too much."""
_LABELS_LIMIT_BYTES = 2**26
"""Of a label file. Memory for what a header announces is taken before a byte of it is read."""


@dataclass(frozen=True)
class TarIndex:
    """One shard's samples, in the order in which their first members are stored.

    Sample i is named `keys[i]`, its image is the `image_num_bytes[i]` bytes at
    `image_offsets[i]` of the uncompressed tar, its labels are
    `label_ids[label_offsets[i]:label_offsets[i + 1]]`. All arrays are int64.
    """

    path: str
    keys: tuple[str, ...]
    image_offsets: NDArray[np.int64]
    image_num_bytes: NDArray[np.int64]
    label_ids: NDArray[np.int64]
    label_offsets: NDArray[np.int64]

    def labels(self, index: int) -> tuple[int, ...]:
        first, end = self.label_offsets[index : index + 2]
        return tuple(self.label_ids[first:end].tolist())


@dataclass
class _Members:
    """The members of one sample that we know what to do with."""

    image: tuple[int, int] | None = None
    """Offset and number of bytes."""
    labels: dict[str, bytes] = field(default_factory=dict)
    """The label files by suffix."""


def index_tar(path: str, archive: BinaryIO) -> TarIndex:
    """Index the uncompressed tar `archive`, which messages call `path`.

    Raises InputError, naming the file and the key, for a truncated or damaged tar, for a sample
    without an image or without labels, and for labels that are not class ids.
    """
    found: list[tuple[str, tuple[int, int], tuple[int, ...]]] = []
    for key, members in _members_by_key(path, archive).items():
        where = f"{path}: sample {key!r}"
        if members.image is None:
            raise InputError(
                f"{where} has labels but no image: add one of {_listed(IMAGE_SUFFIXES)} or drop it"
            )
        found.append((key, members.image, parse_labels(where, members.labels)))
    lengths = [len(labels) for _, _, labels in found]
    return TarIndex(
        path,
        keys=tuple(key for key, _, _ in found),
        image_offsets=np.array([image[0] for _, image, _ in found], np.int64),
        image_num_bytes=np.array([image[1] for _, image, _ in found], np.int64),
        label_ids=np.array([i for _, _, labels in found for i in labels], np.int64),
        label_offsets=np.cumsum([0, *lengths], dtype=np.int64),
    )


def _members_by_key(path: str, archive: BinaryIO) -> dict[str, _Members]:
    samples: dict[str, _Members] = {}
    for member in regular_files(path, archive):
        key, suffix = key_and_suffix(member.name)
        if key is None or suffix not in IMAGE_SUFFIXES | {".json", ".cls"}:
            continue
        members = samples.setdefault(key, _Members())
        if suffix not in IMAGE_SUFFIXES:
            if member.size > _LABELS_LIMIT_BYTES:  # as a damaged header may say
                raise unreadable(path, f"{member.name} has {member.size} bytes")
            archive.seek(member.offset_data)
            members.labels[suffix] = archive.read(member.size)
        elif members.image is None:
            members.image = (member.offset_data, member.size)
        else:
            raise InputError(
                f"{path}: sample {key!r} has two images: give each image a key of its own "
                "(the key is the name up to its first dot)"
            )
    return samples


def regular_files(path: str, archive: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular members, in stored order; InputError unless the whole tar can be read."""
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for member in tar:
                if member.size < 0:  # its end would be before its beginning, again and again
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                if member.isreg():
                    yield member
            end = tar.offset
        archive.seek(end)
        # tarfile takes a missing end, or a damaged header in the middle, for the end of the tar.
        whole = archive.read(_BLOCK_BYTES) == bytes(_BLOCK_BYTES)
    except _DAMAGE as error:
        raise unreadable(path, str(error)) from None
    if not whole:
        raise unreadable(path, f"no end-of-archive block at byte {end}")


def unreadable(path: str, reason: str) -> InputError:
    return InputError(
        f"{path}: truncated or damaged, its samples would be lost; copy or make it again "
        f"({' '.join(reason.split())})"
    )


def key_and_suffix(name: str) -> tuple[str | None, str]:
    """The name up to its first dot, with its folder, and the rest; no key for hidden files."""
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    return (str(path.parent / stem) if stem else None), dot + suffix.lower()


def parse_labels(where: str, files: dict[str, bytes]) -> tuple[int, ...]:
    if ".json" in files:
        parsed = _parse_json(where, files[".json"])
        if "labels" in parsed:
            return _checked_ids(where, parsed["labels"])
    if ".cls" in files:
        return _parse_cls(where, files[".cls"])
    missing = 'a `labels` list in its .json, like {"labels": [3, 17]}' if files else "a label file"
    raise InputError(f"{where} lacks {missing}: add it (.json, or .cls with one id), or drop it")


def _parse_json(where: str, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} has a malformed .json: mend it ({error})") from None
    if not isinstance(parsed, dict):
        raise InputError(
            f'{where} has a .json that is not an object: write it as {{"labels": [3, 17]}}'
        )
    return parsed


def _checked_ids(where: str, labels: Any) -> tuple[int, ...]:
    if not isinstance(labels, list):
        raise InputError(
            f"{where} has labels {_short(labels)}, not a list: write a list of class ids"
        )
    for label in labels:
        if isinstance(label, str):
            raise InputError(
                f"{where} has the label {_short(label)}, a text where a class id is expected: "
                "number the classes from 0 and write their ids"
            )
        if type(label) is not int or not -_ID_LIMIT <= label < _ID_LIMIT:
            raise InputError(
                f"{where} has the label {_short(label)}, which is no class id: write integers "
                "from 0"
            )
    return tuple(dict.fromkeys(labels))


def _parse_cls(where: str, content: bytes) -> tuple[int, ...]:
    text = content.decode("ascii", errors="replace").strip()
    if not text.removeprefix("-").isdecimal() or len(text) > len(str(_ID_LIMIT)):
        raise InputError(
            f"{where} has {_short(text)} in its .cls, which is no class id: write one integer "
            "from 0"
        )
    return (int(text),)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _listed(suffixes: frozenset[str]) -> str:
    return ", ".join(sorted(suffixes))
