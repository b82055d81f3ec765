"""What a source lists: images by path, and their labels as the source writes them."""

import os
import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from asynception.data.shard_writer import check_name
from model.errors import InputError
from worker.data.source import IMAGE_SUFFIXES

LabelKind = Literal["auto", "names", "ids"]
"""What labels are: names, class ids, or (auto) names unless they are numbers."""


class Row(NamedTuple):
    """An image and labels of it; several rows may tell of one image."""

    key: str
    path: str
    """Relative to the listing's root, or absolute."""
    labels: tuple[str | int, ...]
    line: int
    """Of the file that lists it, for messages; 0 where there is no file."""


@dataclass
class Listing:
    """Rows to be read once, in any order."""

    name: str
    """The file or folder, for messages."""
    root: str
    """Folder of the images."""
    rows: Iterable[Row]
    label_kind: LabelKind
    class_order: tuple[str, ...] | None = None
    """The order of classes where the source has one of its own."""
    left_out: Counter[str] = field(default_factory=Counter)
    """What is not among the rows, in words, and how often; complete when they have been read."""


def image_row(where: str, path: str, labels: tuple[str | int, ...], line: int = 0) -> Row:
    """Raises InputError, which begins with `where`, for a path that can't become a sample."""
    suffix = os.path.splitext(path)[1].lower()
    if "://" in path or "\0" in path:
        raise InputError(f"{where}: {path!r} is no path of a file: copy the images to a folder")
    if suffix not in IMAGE_SUFFIXES:
        raise InputError(
            f"{where}: {path!r} doesn't end in {', '.join(sorted(IMAGE_SUFFIXES))}, so nobody "
            "would read it as an image: rename it or drop the line"
        )
    key = key_of(path)
    check_name(key, suffix)
    return Row(key, path, labels, line)


def key_of(path: str) -> str:
    """The sample's name: the path without its suffix, so that readers can't cut it short.

    Readers end a key at the first dot after its last slash, so dots there become %2E, and % is
    written as %25, as in URLs.
    """
    normal = posixpath.normpath(path).lstrip("/")
    folder, last = posixpath.split(posixpath.splitext(normal)[0])
    parts = [part.replace("%", "%25") for part in folder.split("/") if folder]
    parts = ["%2E%2E" if part == ".." else part for part in parts]
    return "/".join([*parts, last.replace("%", "%25").replace(".", "%2E")])
