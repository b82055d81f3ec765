"""Checkpoints behind a URL: made on a local disk, then copied file by file, `metadata.json` last.

What has no `metadata.json` is no checkpoint, so that a copy that was cut short, or a deletion, is
never taken for one: a copy ends with that file, a deletion begins with it.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec.core import url_to_fs

from model.errors import InputError
from ps.checkpoint import (
    ASIDE,
    INCOMPLETE,
    METADATA,
    PREFIX,
    Checkpoint,
    ModelLayout,
    fill_folder,
    free_name,
    read_checkpoint,
    read_metadata,
)
from ps.client import ModelState


class StorageError(OSError):
    """What a driver raised, of whatever kind: its message in one line."""


@contextmanager
def _driver(what: str) -> Iterator[None]:
    """Turns what the block's driver raises into StorageError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # drivers raise what they like, OSError or not
        lines = str(error).split("\n", 1)
        raise StorageError(f"{what}: {type(error).__name__}: {lines[0]}") from error


class RemoteFolder:
    """A folder of checkpoints behind a URL. One thread writes to it at a time."""

    def __init__(self, url: str, staging: Path, options: Mapping[str, Any]) -> None:
        """staging: local folder with room for one checkpoint. options: of the fsspec driver.

        Raises InputError where no driver opens the URL.
        """
        self.url, self._staging = url.rstrip("/"), staging
        try:
            self._fs, self._root = url_to_fs(self.url, **options)
        except Exception as error:  # drivers raise what they like for options they can't use
            raise InputError(
                f"checkpoint.path = {url} can't be opened ({error}), so nothing could be saved: "
                "check it, checkpoint.storage_options, and the driver's Python package"
            ) from None

    def list(self) -> "list[RemoteCheckpoint]":
        """The whole checkpoints, oldest first. Raises StorageError."""
        return [RemoteCheckpoint(self, name) for name, whole in self._names().items() if whole]

    def _names(self) -> dict[str, bool]:
        """By name, in order, whether it has its `metadata.json`."""
        with _driver(f"{self.url} can't be listed"):
            self._fs.invalidate_cache()
            if not self._fs.exists(self._root):
                return {}
            paths = [str(path).rstrip("/") for path in self._fs.ls(self._root, detail=False)]
            names = sorted(path.rpartition("/")[2] for path in paths)
            return {
                name: self._fs.exists(self._path(name, METADATA))
                for name in names
                if name.startswith(PREFIX)
            }

    def _path(self, *names: str) -> str:
        return "/".join((self._root, *names))

    def write(
        self, state: ModelState, layout: ModelLayout, extra: Mapping[str, Any]
    ) -> "RemoteCheckpoint":
        """See `write_checkpoint`. Raises OSError; what was copied by then is deleted if it can be,
        and else with the next `prune`.
        """
        name = free_name(list(self._names()), state.clocks.updates)
        self._staging.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=INCOMPLETE, dir=self._staging) as made:
            fill_folder(Path(made), state, layout, extra)
            try:
                self._upload(Path(made), name)
            except StorageError:
                with suppress(StorageError):
                    self._delete(name)
                raise
        return RemoteCheckpoint(self, name)

    def _upload(self, made: Path, name: str) -> None:
        with _driver(f"{self.url}/{name} can't be written"):
            if not self._fs.async_impl:
                # Asynchronous drivers are those of object stores. Keys need no folders there, and
                # this would make a bucket of whatever name was given.
                self._fs.makedirs(self._path(name), exist_ok=True)
            files = sorted(path for path in made.iterdir() if path.name != METADATA)
            for file in files:
                self._put(file, self._path(name, file.name))
            # Under another name until it is known to be whole.
            last = self._path(name, INCOMPLETE + METADATA)
            self._put(made / METADATA, last)
            self._fs.mv(last, self._path(name, METADATA))

    def _put(self, file: Path, path: str) -> None:
        self._fs.put_file(str(file), path)
        size = self._fs.size(path)
        if size != file.stat().st_size:
            raise OSError(f"{file.name} has {size} bytes there")

    def _delete(self, name: str) -> None:
        with _driver(f"{self.url}/{name} can't be deleted"):
            if self._fs.exists(self._path(name, METADATA)):
                self._fs.rm_file(self._path(name, METADATA))
            if self._fs.exists(self._path(name)):
                self._fs.rm(self._path(name), recursive=True)

    def prune(self, num_to_keep: int | None, spared: Collection[str] = ()) -> None:
        """See `prune_checkpoints`. Raises OSError."""
        for leftover in self._staging.glob(f"{INCOMPLETE}*"):
            shutil.rmtree(leftover)
        names = self._names()
        whole = [name for name, is_whole in names.items() if is_whole]
        old = whole[:-num_to_keep] if num_to_keep else []
        for name, is_whole in names.items():
            if not is_whole or (name in old and name not in spared):
                self._delete(name)

    def set_aside(self, name: str) -> None:
        """See `ps.checkpoint.set_aside`. Raises StorageError."""
        aside = self._path(ASIDE + name.removeprefix(PREFIX))
        with _driver(f"{self.url}/{name} can't be set aside"):
            if self._fs.exists(aside):
                self._fs.rm(aside, recursive=True)
            self._fs.copy(self._path(name), aside, recursive=True)
        self._delete(name)

    def fetched(self, name: str, files: Callable[[Path], Sequence[str]], into: Path) -> Path:
        """A local folder with the metadata, and then the files that it is asked for."""
        folder = into / name
        folder.mkdir()
        try:
            with _driver("can't be fetched"):
                self._fs.get_file(self._path(name, METADATA), str(folder / METADATA))
                for file in files(folder):
                    self._fs.get_file(self._path(name, file), str(folder / file))
        except StorageError as error:
            raise InputError(f"checkpoint {self.url}/{name} {error}") from None
        return folder


@dataclass(frozen=True)
class RemoteCheckpoint:
    """One checkpoint in such a folder."""

    folder: RemoteFolder
    name: str

    def __str__(self) -> str:
        return f"{self.folder.url}/{self.name}"

    def metadata(self) -> dict[str, Any]:
        """See `read_metadata`."""
        with TemporaryDirectory() as into, self._named(Path(into)):
            return read_metadata(self.folder.fetched(self.name, lambda _: (), Path(into)))

    def read(self, layout: ModelLayout, slots: Sequence[str]) -> Checkpoint:
        """See `read_checkpoint`; takes room for all of it on the local disk meanwhile."""

        def files(folder: Path) -> Sequence[str]:
            # Names from afar become paths here.
            return [Path(file).name for file in read_metadata(folder)["files"]]

        with TemporaryDirectory() as into, self._named(Path(into)):
            local = self.folder.fetched(self.name, files, Path(into))
            return replace(read_checkpoint(local, layout, slots), path=str(self))

    @contextmanager
    def _named(self, into: Path) -> Iterator[None]:
        """Errors speak of the checkpoint, not of its copy."""
        try:
            yield
        except InputError as error:
            raise InputError(str(error).replace(str(into / self.name), str(self))) from None
