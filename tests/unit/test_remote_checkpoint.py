"""Checkpoints behind a URL: the same state comes back, and a store that fails costs nothing old."""

import re
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import register_implementation
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from model.flat import Segment, flat_numel, named_views
from ps.checkpoint import METADATA, ModelLayout
from ps.checkpoint_store import (
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    read_metadata,
    set_aside,
    write_checkpoint,
)
from ps.client import ModelState
from ps.remote_checkpoint import RemoteFolder, StorageError
from ps.schedule import Clocks

LAYOUT = ModelLayout((Segment("weight", (3, 5), 0, True),), (Segment("bn", (7,), 0, False),))
SLOTS = ("momentum",)


class Flaky(MemoryFileSystem):
    """Fails in its n-th operation that counts from `arm` on, and in all after it until `mend`."""

    protocol = "flaky"
    store, pseudo_dirs = {}, [""]
    left: int | None = None

    def _count(self) -> None:
        if Flaky.left is not None:
            Flaky.left -= 1
            if Flaky.left < 0:
                raise RuntimeError("the bucket is gone\nand so on")

    def put_file(self, lpath, rpath, **kwargs):
        self._count()
        if Flaky.left == 0:  # half a file arrives, and the driver says nothing
            self.pipe_file(rpath, Path(lpath).read_bytes()[:-1])
            return
        super().put_file(lpath, rpath, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self._count()
        return super().ls(path, detail=detail, **kwargs)

    def rm_file(self, path):
        self._count()
        super().rm_file(path)

    def rm(self, path, **kwargs):
        self._count()
        super().rm(path, **kwargs)


register_implementation("flaky", Flaky)


def empty_stores() -> None:
    for kind in (MemoryFileSystem, Flaky):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    Flaky.left = None


@pytest.fixture(autouse=True)
def _empty_stores():
    empty_stores()
    yield
    empty_stores()


def vector_of(within: tuple[Segment, ...], generator: torch.Generator) -> torch.Tensor:
    """Padding is zero."""
    vector = torch.zeros(flat_numel(within))
    for view in named_views(vector, within).values():
        view.copy_(torch.randn(view.shape, generator=generator))
    return vector


def state_of(updates: int) -> ModelState:
    generator = torch.Generator().manual_seed(updates)
    names = ("parameters", "ema", "slot.momentum")
    vectors = {name: vector_of(LAYOUT.parameters, generator) for name in names}
    for name in ("statistics", "ema_statistics"):
        vectors[name] = vector_of(LAYOUT.statistics, generator)
    return ModelState(Clocks(updates, 8 * updates), vectors, {})


def assert_whole(saved, updates: int) -> None:
    checkpoint = read_checkpoint(saved, LAYOUT, SLOTS)
    expected = state_of(updates)
    assert checkpoint.state.clocks == expected.clocks
    assert all(torch.equal(v, expected.vectors[n]) for n, v in checkpoint.state.vectors.items())
    assert checkpoint.path == str(saved)
    assert read_metadata(saved)["extra"] == checkpoint.extra == {"wall_s": updates}


def write(folder, updates: int):
    return write_checkpoint(folder, state_of(updates), LAYOUT, {"wall_s": updates})


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_what_is_written_behind_a_url_comes_back_in_order_and_is_pruned(kind, tmp_path):
    url = f"file://{tmp_path}/there/run" if kind == "file" else "memory://there/run"
    folder = RemoteFolder(url, tmp_path / "staging", {})
    assert list_checkpoints(folder) == []
    saved = [write(folder, updates) for updates in (5, 40, 9, 9)]
    names = [each.name for each in list_checkpoints(folder)]
    suffixes = ("000000005", "000000009", "000000009-002", "000000040")
    assert names == [f"checkpoint-{suffix}" for suffix in suffixes]
    assert str(saved[0]) == f"{url}/checkpoint-000000005"
    for each, updates in zip(saved, (5, 40, 9, 9), strict=True):
        assert_whole(each, updates)
    prune_checkpoints(folder, 1, spared=["checkpoint-000000009"])
    assert [each.name for each in list_checkpoints(folder)] == [names[1], names[3]]
    set_aside(saved[1])
    assert [each.name for each in list_checkpoints(folder)] == [names[1]]
    assert not list((tmp_path / "staging").iterdir())


def test_a_folder_without_its_last_file_is_no_checkpoint_and_is_swept_away(tmp_path):
    folder = RemoteFolder("memory://run", tmp_path, {})
    write(folder, 5)
    fs = MemoryFileSystem()
    fs.pipe_file("/run/checkpoint-000000007/model.safetensors", b"half")
    assert [each.name for each in list_checkpoints(folder)] == ["checkpoint-000000005"]
    assert write(folder, 7).name == "checkpoint-000000007-002"
    prune_checkpoints(folder, None)
    assert not fs.exists("/run/checkpoint-000000007")
    assert len(list_checkpoints(folder)) == 2


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 16), st.booleans())
def test_a_store_that_fails_costs_a_warning_and_nothing_old(tmp_path_factory, left, keeps_one):
    empty_stores()
    staging = tmp_path_factory.mktemp("staging")
    folder = RemoteFolder("flaky://run", staging, {})
    for updates in (5, 9):
        write(folder, updates)
    Flaky.left = left
    failure = None
    try:
        write(folder, 12)
        prune_checkpoints(folder, 1 if keeps_one else None)
    except OSError as error:
        failure = error
    Flaky.left = None
    assert failure is None or (isinstance(failure, StorageError) and "\n" not in str(failure))
    updates = {int(each.name.rpartition("-")[2]): each for each in list_checkpoints(folder)}
    assert 12 in updates or {5, 9} <= set(updates), "no old one goes before the new one is there"
    for number, each in updates.items():
        assert_whole(each, number)
    assert not list(staging.iterdir())
    write(folder, 20)
    prune_checkpoints(folder, 1)
    assert [each.name for each in list_checkpoints(folder)] == ["checkpoint-000000020"]
    assert all("checkpoint-000000020/" in path for path in Flaky.store), "no litter is left"


def test_damage_is_named_by_the_url(tmp_path):
    folder = RemoteFolder("memory://run", tmp_path, {})
    saved, fs = write(folder, 5), MemoryFileSystem()
    path = "/run/checkpoint-000000005/ema.safetensors"
    fs.pipe_file(path, fs.cat_file(path)[:-1] + b"x")
    with pytest.raises(InputError, match=re.escape(f"{saved}: ema.safetensors is damaged")):
        read_checkpoint(saved, LAYOUT, SLOTS)
    fs.pipe_file(f"/run/checkpoint-000000005/{METADATA}", b"{}")
    with pytest.raises(InputError, match=f"checkpoint {re.escape(str(saved))} has format None"):
        read_metadata(saved)
    fs.rm(path)
    fs.rm_file(f"/run/checkpoint-000000005/{METADATA}")
    with pytest.raises(InputError, match="can't be fetched: FileNotFoundError"):
        read_metadata(saved)


def test_a_url_that_no_driver_opens_is_refused_with_its_setting(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint\.path = nosuch://x can't be opened"):
        RemoteFolder("nosuch://x", tmp_path, {})
