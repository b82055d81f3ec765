"""What decodes files, for `fuzz.py`."""

import hashlib
import io
import json
import struct
import tarfile
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_target import Target
from PIL import Image as Picture

from asynception.orders import REQUEST_FILE, Order, Orders
from model.errors import InputError
from model.flat import Segment
from ps.checkpoint import (
    METADATA,
    MODEL_FILE,
    ModelLayout,
    metadata_checksum,
    read_checkpoint,
    write_checkpoint,
)
from ps.client import ModelState
from ps.rules import SGD
from ps.schedule import Clocks
from ps.state import initial_state
from worker.data.decode import CorruptImage, open_image
from worker.data.idx import IdxSource
from worker.data.manifest import Manifest, ShardEntry
from worker.data.tar_index import index_tar

MAX_PIXELS = 1 << 20
DEEP = b"[" * 2000
"""Nested beyond what Python's parser follows."""
MEMBERS = {"a.png": b"1", "a.json": b'{"labels": [1]}', f"{60 * 'd'}/{60 * 'b'}": b""}
"""Of a tar; the last name has to be cut in two, or written elsewhere."""


@cache
def _folder() -> Path:
    """For files that are written anew for each case."""
    holder = tempfile.TemporaryDirectory()
    _KEPT.append(holder)
    return Path(holder.name)


_KEPT: list[Any] = []
_LAYOUT = ModelLayout((Segment("w", (3,), 0, True),), (Segment("m", (2,), 0, False),))


@cache
def _checkpoint() -> Path:
    state = initial_state(SGD(), torch.zeros(16), torch.zeros(16))
    model_state = ModelState(Clocks(7, 56), state.vectors, {})
    return write_checkpoint(_folder(), model_state, _LAYOUT, {"wall_s": 1.0})


def _sealed(metadata: Any) -> bytes:
    """As a file whose checksum is right, whatever it says."""
    if isinstance(metadata, dict):
        metadata["checksum"] = metadata_checksum(metadata)
    return json.dumps(metadata).encode()


def _read_metadata(data: bytes) -> None:
    """With a first byte of its own, the checksum is made to fit."""
    path, content = _checkpoint(), data
    if data[:1] == b"!":
        try:
            content = _sealed(json.loads(data[1:]))
        except (ValueError, RecursionError):
            content = data[1:]
    before = (path / METADATA).read_bytes()
    (path / METADATA).write_bytes(content)
    try:
        read_checkpoint(path, _LAYOUT, ())
    finally:
        (path / METADATA).write_bytes(before)


def _metadata() -> Sequence[bytes]:
    content = (_checkpoint() / METADATA).read_bytes()
    return [content, b"!" + content, DEEP]


def _read_tensors(data: bytes) -> None:
    """In a file whose hash is as it should be."""
    path = _checkpoint()
    before = {name: (path / name).read_bytes() for name in (METADATA, MODEL_FILE)}
    metadata = json.loads(before[METADATA])
    metadata["files"][MODEL_FILE] = hashlib.sha256(data).hexdigest()
    (path / MODEL_FILE).write_bytes(data)
    (path / METADATA).write_bytes(_sealed(metadata))
    try:
        read_checkpoint(path, _LAYOUT, ())
    finally:
        for name, content in before.items():
            (path / name).write_bytes(content)


def _tensors() -> Sequence[bytes]:
    return [(_checkpoint() / MODEL_FILE).read_bytes()]


def _read_manifest(data: bytes) -> None:
    Manifest.from_json(data, "it")


def _manifests() -> Sequence[bytes]:
    shard = ShardEntry("train-0.tar", 4, 5, hashlib.sha256(b"").hexdigest())
    return [Manifest((shard,), np.array([3, 1]), 1, 1, ("a", "b")).to_json().encode(), DEEP]


def _read_tar(data: bytes) -> None:
    """With a first byte of its own, the checksums of headers are made to fit."""
    content = _summed(data[1:]) if data[:1] == b"!" else data
    index_tar("it", io.BufferedReader(io.BytesIO(content)))


def _summed(data: bytes) -> bytes:
    blocks = [bytearray(data[at : at + 512]) for at in range(0, len(data), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def _tars() -> Sequence[bytes]:
    made = []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for name, content in MEMBERS.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                member.pax_headers = {"comment": "x"} if form == tarfile.PAX_FORMAT else {}
                tar.addfile(member, io.BytesIO(content))
        content = file.getvalue().rstrip(b"\0")
        made.append(content + bytes(-len(content) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE))
    return [*made, *(b"!" + each for each in made)]


def _read_idx(data: bytes) -> None:
    """The images; their labels are well."""
    path = _folder() / "train-images-idx3-ubyte"
    path.write_bytes(data)
    (_folder() / "train-labels-idx1-ubyte").write_bytes(struct.pack(">IIB", 0x801, 1, 7))
    IdxSource(str(path))


def _idx() -> Sequence[bytes]:
    return [struct.pack(">IIII4B", 0x803, 1, 2, 2, 0, 1, 2, 3)]


def _read_order(data: bytes) -> None:
    (_folder() / REQUEST_FILE).write_bytes(data)
    Orders().carry_out(_Nobody(), _folder())


class _Nobody:
    """A run that does as it is told."""

    is_complete, pending = True, ""

    def scale(self, order: Order) -> None:
        assert {type(order.num_workers), type(order.num_servers)} == {int, type(None)}


def _orders() -> Sequence[bytes]:
    order = json.dumps({"id": "1", "num_workers": 3}).encode()
    of_servers = json.dumps({"id": "1", "num_workers": None, "num_servers": 3}).encode()
    return [order, of_servers, order.replace(b"3", b"1e999"), DEEP]


def _read_picture(data: bytes) -> None:
    open_image(data, MAX_PIXELS).rgb(shrink=2.0)


def _pictures() -> Sequence[bytes]:
    made = []
    for form in ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF"):
        file = io.BytesIO()
        Picture.new("RGB", (5, 4), "red").save(file, form)
        made.append(file.getvalue())
    return made


FILE_TARGETS = {
    "metadata": Target(_read_metadata, (InputError,), _metadata),
    "tensors": Target(_read_tensors, (InputError,), _tensors),
    "manifests": Target(_read_manifest, (InputError,), _manifests),
    "tars": Target(_read_tar, (InputError,), _tars),
    "idx": Target(_read_idx, (InputError,), _idx),
    "orders": Target(_read_order, (), _orders),
    "pictures": Target(_read_picture, (CorruptImage,), _pictures),
}
"""By name."""
