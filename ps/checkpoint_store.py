"""Checkpoints wherever they are kept: in a local or mounted folder, or behind a URL."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from model.errors import InputError
from ps import checkpoint as local
from ps.checkpoint import Checkpoint, ModelLayout
from ps.client import ModelState
from ps.remote_checkpoint import RemoteCheckpoint, RemoteFolder, StorageError

Folder = Path | RemoteFolder
"""Holds the checkpoints of one run."""

Saved = Path | RemoteCheckpoint
"""A checkpoint in such a folder: it has a `name`, and its `str` is where it is."""


def list_checkpoints(folder: Folder) -> Sequence[Saved]:
    """The whole checkpoints in a folder, oldest first. Raises InputError if it can't be read."""
    if isinstance(folder, Path):
        return local.list_checkpoints(folder)
    try:
        return folder.list()
    except StorageError as error:
        raise InputError(f"checkpoint.path: {error}") from error


def prune_checkpoints(
    folder: Folder, num_to_keep: int | None, spared: Collection[str] = ()
) -> None:
    """Delete what unfinished writes left, and all but the newest `num_to_keep` checkpoints.

    spared: names of some that are kept besides. Raises OSError.
    """
    if isinstance(folder, Path):
        local.prune_checkpoints(folder, num_to_keep, spared)
    else:
        folder.prune(num_to_keep, spared)


def write_checkpoint(
    folder: Folder, state: ModelState, layout: ModelLayout, extra: Mapping[str, Any]
) -> Saved:
    """Write a checkpoint named for the updates that are in it.

    `state` must hold all vectors, `extra` JSON values. None that exists is ever overwritten.
    Raises OSError, with all earlier checkpoints still whole.
    """
    if isinstance(folder, Path):
        return local.write_checkpoint(folder, state, layout, extra)
    return folder.write(state, layout, extra)


def read_metadata(saved: Saved) -> dict[str, Any]:
    """The metadata of a checkpoint. Raises InputError."""
    return local.read_metadata(saved) if isinstance(saved, Path) else saved.metadata()


def read_checkpoint(saved: Saved, layout: ModelLayout, slots: Sequence[str]) -> Checkpoint:
    """A checkpoint, verified; see `ps.checkpoint.read_checkpoint`. Raises InputError."""
    if isinstance(saved, Path):
        return local.read_checkpoint(saved, layout, slots)
    return saved.read(layout, slots)


def set_aside(saved: Saved) -> None:
    """Take a checkpoint from the list: it stays, under a name that begins with `diverged-`.

    Raises OSError.
    """
    if isinstance(saved, Path):
        local.set_aside(saved)
    else:
        saved.folder.set_aside(saved.name)
