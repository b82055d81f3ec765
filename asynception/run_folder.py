"""A run's folder: taken by one process at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asynception.config import TrainConfig
from asynception.recipe import save_config
from asynception.run_files import CONFIG_FILE
from model.errors import InputError
from ps.checkpoint_store import Folder, list_checkpoints
from ps.remote_checkpoint import RemoteFolder


def folder_of(config: TrainConfig) -> Path:
    """Where the run is kept."""
    assert config.run.name is not None, "load_config and Trainer name every run"
    return Path(config.run.storage_path) / config.run.name


CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints in its own folder."""


def checkpoints_of(config: TrainConfig, folder: Path) -> Folder:
    """Where the checkpoints are of the run that is kept in `folder`. Raises InputError."""
    path = config.checkpoint.path
    if path is None:
        return folder / CHECKPOINTS
    if "://" not in path:
        return Path(path) / folder.name
    url = f"{path.rstrip('/')}/{folder.name}"
    return RemoteFolder(url, folder / CHECKPOINTS, config.checkpoint.storage_options)


def check_folder(config: TrainConfig, resume: bool) -> None:
    """Raises InputError if the name is in use, or if there is nothing to resume."""
    folder = folder_of(config)
    if "://" in config.run.storage_path:
        raise InputError(
            f"run.storage_path = {config.run.storage_path}: only local and mounted file systems; "
            f"give a path that the trainer's machine can write"
        )
    if resume and not (folder / CONFIG_FILE).is_file():
        raise InputError(f"there is no run to resume at {folder}: check run.name")
    elsewhere = config.checkpoint.path is not None
    if elsewhere and not resume and list_checkpoints(checkpoints_of(config, folder)):
        raise InputError(
            f"run.name = {config.run.name} has checkpoints in checkpoint.path = "
            f"{config.checkpoint.path} already: choose another name, or go on with --resume"
        )
    if not resume and folder.exists():
        raise InputError(
            f"run.name = {config.run.name} is in use ({folder} exists): choose another name, or "
            f"go on with --resume"
        )


@contextmanager
def taken(config: TrainConfig, resume: bool) -> Iterator[Path]:
    """The run's folder, held until the block ends; if new, it is made with the config in it.

    A resumed run keeps its config until the new one is known to fit its checkpoint. Raises
    InputError if another process holds it.
    """
    check_folder(config, resume)
    folder = folder_of(config)
    try:
        folder.mkdir(parents=True, exist_ok=resume)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(
            f"run.storage_path = {config.run.storage_path}: {error.strerror} ({folder})"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"run {folder} is going on in another process") from None
        if not resume:
            save_config(config, folder)
        yield folder
