"""Checkpoints: a state as safetensors by tensor name, independent of the number of shards.

A checkpoint is a folder. It is written under a temporary name, `metadata.json` last, flushed to
disk and renamed, so that a folder with a checkpoint's name is whole whatever was killed when.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import InputError
from model.flat import Segment, copy_named_, flat_numel, named_views
from ps.client import ModelState
from ps.schedule import Clocks

FORMAT = 1
METADATA = "metadata.json"
MODEL_FILE, EMA_FILE = "model.safetensors", "ema.safetensors"
_KINDS = {"updates": int, "samples": int, "files": dict, "extra": dict}
"""Of what readers use of the metadata, though a checksum is right."""
PREFIX, INCOMPLETE, ASIDE = "checkpoint-", ".incomplete-", "diverged-"


@dataclass(frozen=True)
class ModelLayout:
    """Names and places of a model's tensors in its flat vectors."""

    parameters: Sequence[Segment]
    statistics: Sequence[Segment]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's state, and what the run had put beside it."""

    path: Path | str
    state: ModelState
    extra: Mapping[str, Any]


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return [path for path in _all(folder) if (path / METADATA).is_file()]


def prune_checkpoints(folder: Path, num_to_keep: int | None, spared: Collection[str] = ()) -> None:
    """Delete what unfinished writes left, and all but the newest `num_to_keep` checkpoints.

    spared: names of some that are kept besides.
    """
    for leftover in folder.glob(f"{INCOMPLETE}*"):
        shutil.rmtree(leftover)
    old = list_checkpoints(folder)[:-num_to_keep] if num_to_keep else []
    for path in (each for each in old if each.name not in spared):
        # Renamed first, so that a half-deleted checkpoint doesn't pass for a whole one.
        doomed = path.with_name(INCOMPLETE + path.name)
        path.rename(doomed)
        shutil.rmtree(doomed)


def set_aside(path: Path) -> None:
    """Take a checkpoint from the list: it stays, under a name that begins with `diverged-`."""
    aside = path.with_name(ASIDE + path.name.removeprefix(PREFIX))
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)


def write_checkpoint(
    folder: Path, state: ModelState, layout: ModelLayout, extra: Mapping[str, Any]
) -> Path:
    """Write a checkpoint named for the updates that are in it; returns its path.

    `state` must hold all vectors, `extra` JSON values. None that exists is ever overwritten.
    Raises OSError, with all earlier checkpoints still whole.
    """
    name = free_name([path.name for path in _all(folder)], state.clocks.updates)
    path, incomplete = folder / name, folder / (INCOMPLETE + name)
    if incomplete.exists():
        shutil.rmtree(incomplete)
    incomplete.mkdir(parents=True)
    try:
        fill_folder(incomplete, state, layout, extra)
        incomplete.rename(path)
    except OSError:
        shutil.rmtree(incomplete, ignore_errors=True)  # on a full disk it would be in the way
        raise
    _flush(folder)
    return path


def fill_folder(
    folder: Path, state: ModelState, layout: ModelLayout, extra: Mapping[str, Any]
) -> None:
    """Write the files of a checkpoint into an empty folder, `metadata.json` last."""
    files = {}
    for file, tensors in _files(state, layout).items():
        _save(tensors, folder / file)
        files[file] = _sha256(folder / file)
        _flush(folder / file)
    metadata = {
        "format": FORMAT,
        "updates": state.clocks.updates,
        "samples": state.clocks.samples,
        "version_skew": state.version_skew,
        "files": files,
        "extra": extra,
    }
    metadata["checksum"] = metadata_checksum(metadata)
    (folder / METADATA).write_text(json.dumps(metadata, indent=1))
    _flush(folder / METADATA)
    _flush(folder)


def _all(folder: Path) -> list[Path]:
    """What bears a checkpoint's name, whole or not."""
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []


def free_name(taken: Collection[str], updates: int) -> str:
    """A name for a checkpoint, or, after a return to an earlier state, one that sorts behind all.

    Also behind those of which an earlier one is pruned already.
    """
    name = f"{PREFIX}{updates:09d}"
    suffixes = [each.removeprefix(f"{name}-") for each in taken if each.startswith(f"{name}-")]
    last = max((int(suffix) for suffix in suffixes if suffix.isdecimal()), default=1)
    return f"{name}-{last + 1:03d}" if name in taken or last > 1 else name


def _files(state: ModelState, layout: ModelLayout) -> dict[str, dict[str, Tensor]]:
    def tensors(parameters: str, statistics: str | None) -> dict[str, Tensor]:
        named = named_views(state.vectors[parameters], layout.parameters)
        if statistics:
            named |= named_views(state.vectors[statistics], layout.statistics)
        return named

    slots = [name for name in state.vectors if name.startswith("slot.")]
    return {
        MODEL_FILE: tensors("parameters", "statistics"),
        EMA_FILE: tensors("ema", "ema_statistics"),
        **{f"{slot}.safetensors": tensors(slot, None) for slot in slots},
    }


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # its own error for a full disk as well
        raise OSError(str(error)) from error
    path.chmod(stat.S_IMODE(mode))  # safetensors makes its files private


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def metadata_checksum(metadata: Mapping[str, Any]) -> str:
    """SHA-256 of what the metadata say, in whatever layout of the file."""
    values = {key: value for key, value in metadata.items() if key != "checksum"}
    # Keys of `extra` that are no strings become strings on the way, which changes their order.
    canonical = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint. Raises InputError."""
    try:
        metadata: Any = json.loads((path / METADATA).read_text())
    except (OSError, ValueError, RecursionError) as error:  # no JSON, or not even text
        raise InputError(f"checkpoint {path}: {METADATA} can't be read: {error}") from None
    if not isinstance(metadata, dict):
        raise InputError(f"checkpoint {path}: {METADATA} is damaged (it is no JSON object)")
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"checkpoint {path} has format {metadata.get('format')!r}; this version reads {FORMAT}"
        )
    if metadata.get("checksum") != metadata_checksum(metadata):
        raise InputError(f"checkpoint {path}: {METADATA} is damaged (its checksum differs)")
    for key, kind in _KINDS.items():
        if type(metadata.get(key)) is not kind:
            raise InputError(
                f"checkpoint {path}: {METADATA} is not of this program: {key} is "
                f"{_short(metadata.get(key))}"
            )
    return metadata


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def read_checkpoint(path: Path, layout: ModelLayout, slots: Sequence[str]) -> Checkpoint:
    """A checkpoint, verified by its checksums, for a model and an optimizer with these slots.

    Raises InputError if it is damaged or of another model or optimizer, naming what differs.
    """
    metadata = read_metadata(path)
    expected = {MODEL_FILE, EMA_FILE, *(f"slot.{slot}.safetensors" for slot in slots)}
    if set(metadata["files"]) != expected:
        raise InputError(
            f"checkpoint {path} holds {sorted(metadata['files'])} and the run needs "
            f"{sorted(expected)}: resume with the optimizer.name that wrote it"
        )
    model, ema = _tensors(path, MODEL_FILE, metadata), _tensors(path, EMA_FILE, metadata)
    vectors = {
        "parameters": _vector(path, layout.parameters, model, layout.statistics),
        "statistics": _vector(path, layout.statistics, model, layout.parameters),
        "ema": _vector(path, layout.parameters, ema, layout.statistics),
        "ema_statistics": _vector(path, layout.statistics, ema, layout.parameters),
    }
    for slot in (f"slot.{slot}" for slot in slots):
        tensors = _tensors(path, f"{slot}.safetensors", metadata)
        vectors[slot] = _vector(path, layout.parameters, tensors, ())
    clocks = Clocks(metadata["updates"], metadata["samples"])
    return Checkpoint(path, ModelState(clocks, vectors, {}), metadata["extra"])


def _tensors(path: Path, file: str, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        if _sha256(path / file) != metadata["files"][file]:
            raise InputError(f"checkpoint {path}: {file} is damaged (its checksum differs)")
        return load_file(path / file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint {path}: {file} can't be read: {error}") from None


def _vector(
    path: Path,
    segments: Sequence[Segment],
    tensors: Mapping[str, Tensor],
    others: Sequence[Segment],
) -> Tensor:
    """The flat vector of `segments`; tensors of `others` belong to another vector."""
    elsewhere = {segment.name for segment in others}
    own = {name: tensor for name, tensor in tensors.items() if name not in elsewhere}
    vector = torch.zeros(flat_numel(segments))
    try:
        copy_named_(vector, segments, own)
    except InputError as error:
        raise InputError(f"checkpoint {path} is of another model: {error}") from None
    return vector
