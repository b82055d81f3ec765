"""Class folders of images, as torchvision's ImageFolder reads them, listed without holding all."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from asynception.data.listing import Listing, Row, image_row
from model.errors import InputError
from worker.data.image_folder import class_folders
from worker.data.source import IMAGE_SUFFIXES

_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


def list_image_folder(source: Path, split: str) -> Listing:
    """Class i is the i-th folder in sorted order; images lie at any depth.

    source: class folders, or splits (train, val) that hold them, of which `split` is taken.
    Raises InputError where there are no class folders, or one without an image.
    """
    names = class_folders(str(source))
    root = source
    if names and _SPLIT_NAMES.issuperset(names):
        if split not in names:
            raise InputError(
                f"--split={split!r} isn't among the splits of {source} ({', '.join(names)}): name "
                "one of them"
            )
        root = source / split
        names = class_folders(str(root))
    if not names:
        raise InputError(f"{root}: has no class folders; put each class's images into its own")
    left_out: Counter[str] = Counter()
    rows = _rows(str(root), names, left_out)
    return Listing(str(root), str(root), rows, "names", names, left_out)


def _rows(root: str, names: tuple[str, ...], left_out: Counter[str]) -> Iterator[Row]:
    for name in names:
        row = None
        for row in _class_rows(root, name, left_out):
            yield row
        if row is None:
            raise InputError(
                f"{os.path.join(root, name)}: a class folder without images, which would be a "
                "class without samples; fill or remove it"
            )


def _class_rows(root: str, name: str, left_out: Counter[str]) -> Iterator[Row]:
    for folder, _, files in os.walk(os.path.join(root, name), followlinks=True):
        for file in files:
            if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
                yield image_row(root, os.path.relpath(os.path.join(folder, file), root), (name,))
            else:
                left_out["files that aren't images"] += 1
