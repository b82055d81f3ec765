"""From the path that a user gives to the source behind it."""

import glob
import os
import re
from collections.abc import Iterable

from model.errors import InputError
from model.user_code import UserFunction, read_user_function
from worker.data.fetch import FetchSettings, is_remote
from worker.data.idx import IdxSource, is_idx
from worker.data.image_folder import ImageFolderSource, class_folders
from worker.data.manifest import SUFFIX
from worker.data.manifest_source import open_manifest
from worker.data.source import ImageSource
from worker.data.user_dataset import UserDatasetSource, is_user_dataset
from worker.data.webdataset import TAR_SUFFIXES, WebDatasetSource

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_source(
    path: str,
    *,
    setting: str = "data.path",
    cached_shards: int = 8,
    fetch: FetchSettings | None = None,
    indexed_samples: int = 250_000,
    function: UserFunction | None = None,
) -> ImageSource:
    """Open the samples at `path`, which messages call by the name of its `setting`.

    path: a manifest or its URL, a tar, a folder of tars, a glob (`train-*.tar`), a brace pattern
    (`train-{00000..00006}.tar.gz`), a folder with one folder of images per class, an idx file of
    images, or a function in a Python file.
    cached_shards: compressed shards to keep decompressed in memory.
    fetch: how what lies behind a URL is got; the defaults unless given.
    indexed_samples: of a manifest, samples to remember the places of; more than a shuffle window.
    function: that in a Python file as it was read, if it was; it is told the end of `setting`.
    Raises InputError when there is nothing usable at `path`.
    """
    where = f"{setting}={path!r}"
    source: ImageSource
    if is_user_dataset(path):
        function = function or read_user_function(path, setting)
        source = UserDatasetSource(function, setting.rpartition(".")[2])
    elif is_remote(path) or path.endswith(SUFFIX):
        source = open_manifest(
            path,
            fetch or FetchSettings(),
            setting,
            cached_shards=cached_shards,
            indexed_samples=indexed_samples,
        )
    elif os.path.isdir(path):
        tars = _tars_in_folder(where, path)
        source = WebDatasetSource(tars, cached_shards) if tars else _image_folder(where, path)
    elif is_idx(path):
        source = IdxSource(path)
    else:
        source = WebDatasetSource(_tars_by_name(where, path), cached_shards)
    if not sum(source.shard_sizes):
        raise InputError(f"{where} holds no samples: name shards with images and labels")
    return source


def _tars_by_name(where: str, path: str) -> list[str]:
    if has_ranges(path):
        paths = expand_ranges(path)
        missing = next((path for path in paths if not os.path.exists(path)), None)
        if missing is not None:
            raise InputError(f"{where} expands to {missing}, which does not exist")
    elif os.path.exists(path):
        paths = [path]
    elif glob.has_magic(path):
        paths = sorted(glob.glob(path))
    else:
        raise InputError(f"{where} does not exist: name a tar, a folder, or a pattern of tars")
    if not paths:
        raise InputError(f"{where} matches no file: name at least one tar")
    other = next((path for path in paths if not path.endswith(TAR_SUFFIXES)), None)
    if other is not None:
        raise InputError(
            f"{where} includes {other}, which is no shard: name files ending in "
            f"{', '.join(TAR_SUFFIXES)}"
        )
    return paths


def has_ranges(path: str) -> bool:
    """Whether it is a pattern for `expand_ranges`."""
    return _RANGE.search(path) is not None


def expand_ranges(pattern: str) -> list[str]:
    """`a-{08..10}` to a-08, a-09, a-10: digits keep the width of the first bound, as in bash."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [
        head + str(number).zfill(len(first)) + rest
        for number in range(int(first), int(last) + 1)
        for rest in expand_ranges(tail)
    ]


def _tars_in_folder(where: str, folder: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if name.endswith(TAR_SUFFIXES))
    prefixes = _shard_prefixes(names)
    if len(prefixes) > 1:
        first = os.path.join(folder, prefixes[0])
        raise InputError(
            f"{where} holds shards of several splits ({', '.join(prefixes)}), which would be "
            f"mixed: name one, like {first}*.tar*"
        )
    return [os.path.join(folder, name) for name in names]


def _shard_prefixes(names: Iterable[str]) -> list[str]:
    """The names of shards without their numbers: train-00001.tar gives `train-`."""
    return sorted({re.sub(r"\d*\.(tar|tar\.gz|tgz)$", "", name) for name in names})


def _image_folder(where: str, folder: str) -> ImageFolderSource:
    if not os.listdir(folder):
        raise InputError(f"{where} is an empty folder: put shards or class folders into it")
    if not class_folders(folder):
        raise InputError(
            f"{where} holds neither tars nor class folders: name a folder of "
            f"{', '.join(TAR_SUFFIXES)} shards or of one folder of images per class"
        )
    return ImageFolderSource(folder)
