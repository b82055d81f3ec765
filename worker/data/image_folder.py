"""A folder of class folders of images, as torchvision.datasets.ImageFolder reads it."""

import os
from collections.abc import Sequence
from pathlib import Path

from model.errors import InputError
from worker.data.source import IMAGE_SUFFIXES, Sample

_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


class ImageFolderSource:
    """Class i is the i-th subfolder of `root` in sorted order; its images lie at any depth.

    A single shard, since any file is as near as any other. Raises InputError when there are no
    class folders, one holds no image, or they look like splits (train, val) instead of classes.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._class_names = class_folders(root)
        if not self._class_names:
            raise InputError(f"{root}: has no class folders; put each class's images into its own")
        if _SPLIT_NAMES.issuperset(self._class_names):
            raise InputError(
                f"{root}: holds splits ({', '.join(self._class_names)}), which would be taken for "
                f"classes; name one, like {os.path.join(root, self._class_names[0])}"
            )
        self._files = [
            (path, label)
            for label, name in enumerate(self._class_names)
            for path in _images(root, name)
        ]

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return (len(self._files),)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    @property
    def cached_shards(self) -> None:
        return None

    @property
    def known_labels(self) -> None:
        return None

    @property
    def fetches(self) -> bool:
        return False

    def announce(self, shards: Sequence[int]) -> None:
        pass

    def labels(self, shard: int, index: int) -> tuple[int, ...]:
        assert shard == 0
        return (self._files[index][1],)

    def read(self, shard: int, index: int) -> Sample:
        assert shard == 0
        key, label = self._files[index]
        try:
            image = Path(self._root, key).read_bytes()
        except OSError as error:
            raise InputError(
                f"{os.path.join(self._root, key)}: cannot be read, check that it exists "
                f"everywhere ({error.strerror})"
            ) from None
        return Sample(key, image, (label,))


def class_folders(root: str) -> tuple[str, ...]:
    with os.scandir(root) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir()))


def _images(root: str, class_name: str) -> list[str]:
    """Paths below `root` of the images of one class, sorted folder by folder."""
    found = []
    for folder, _, names in sorted(os.walk(os.path.join(root, class_name), followlinks=True)):
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                found.append(os.path.relpath(os.path.join(folder, name), root))
    if not found:
        raise InputError(
            f"{os.path.join(root, class_name)}: a class folder without images, which would be a "
            "class without samples; fill or remove it"
        )
    return found
