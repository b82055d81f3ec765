"""The folder of the runs: written, synced, locked, read, deleted; and room for checkpoints."""

import fcntl
import os
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from asynception.doctor.finding import Verdict, fail, ok, warn
from model.errors import InputError

NUM_BYTES = 32 << 20

LIMIT_S = 60.0
"""At half a megabyte a second, nobody would wait for a checkpoint either."""


@dataclass(frozen=True)
class Storage:
    """What a file system did."""

    free: int
    """Bytes."""
    write_s: float
    """For NUM_BYTES, until they are on the disk."""
    read_s: float
    same: bool
    """Whether the same bytes came back."""
    locks: bool
    """Whether a second lock on a file was refused, which keeps two processes from one run."""


def measure_storage(
    storage_path: str, checkpoint_num_bytes: int, num_to_keep: int | None
) -> Verdict:
    """Leaves nothing behind, and makes no folders: it uses the one above if there is none yet.

    checkpoint_num_bytes: 0 if unknown.
    """
    if "://" in storage_path:
        raise InputError(
            f"run.storage_path = {storage_path}: only local and mounted file systems; give a path"
            " that this machine can write"
        )
    folder = Path(os.path.abspath(storage_path))
    while not folder.exists():
        folder = folder.parent
    try:
        storage = _use(folder)
    except OSError as error:
        return fail(
            f"{folder}: {error.strerror or error}",
            "give a run.storage_path that this user can write, with room and locks",
        )
    return judge_storage(storage, checkpoint_num_bytes, num_to_keep)


def _use(folder: Path) -> Storage:
    free = shutil.disk_usage(folder).free
    content = secrets.token_bytes(1 << 20) * (NUM_BYTES >> 20)
    with tempfile.TemporaryDirectory(prefix=".asynception-doctor-", dir=folder) as made:
        path = Path(made, "written")
        started_s = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        path = path.rename(path.with_name("renamed"))
        written_s = time.perf_counter()
        same = _read_from_disk(path) == content
        read_s = time.perf_counter() - written_s
        return Storage(free, written_s - started_s, read_s, same, _locks(path))


def _read_from_disk(path: Path) -> bytes:
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # out of memory, as far as the system goes along
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def _locks(path: Path) -> bool:
    with path.open("rb") as first, path.open("rb") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def judge_storage(storage: Storage, checkpoint_num_bytes: int, num_to_keep: int | None) -> Verdict:
    """A new checkpoint is whole before the oldest is deleted: so there is one more than is kept."""
    write, read = (NUM_BYTES / 1e6 / max(s, 1e-9) for s in (storage.write_s, storage.read_s))
    found = f"written at {write:,.0f} MB/s, read at {read:,.0f}; {storage.free / 1e9:,.1f} GB free"
    if not storage.same:
        return fail(f"{found}; other bytes came back", "do not use this disk")
    if not storage.locks:
        return fail(
            f"{found}; two processes got one lock",
            "mount it with locks, or give a run.storage_path elsewhere",
        )
    if not checkpoint_num_bytes:
        return ok(found)
    most = checkpoint_num_bytes * (1 + (num_to_keep or 1))
    kept = "all" if num_to_keep is None else num_to_keep
    found += f"; keeping {kept} of {checkpoint_num_bytes / 1e6:,.1f} MB"
    mend = "free some room, lower checkpoint.num_to_keep, or give a run.storage_path elsewhere"
    if storage.free < most:
        return fail(f"{found} takes {most / 1e6:,.1f} MB", mend)
    if storage.free < 2 * most or (num_to_keep is None and storage.free < 100 * most):
        return warn(found, mend)
    return ok(found)
