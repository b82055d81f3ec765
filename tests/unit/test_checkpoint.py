"""Checkpoints on disk: what comes back, what is kept, and what a kill leaves behind."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import LAYOUT, RULES, random_state, read, same, segments
from hypothesis import given, settings
from hypothesis import strategies as st

import ps.checkpoint as checkpoint
from model.flat import named_views
from ps.checkpoint import (
    METADATA,
    ModelLayout,
    list_checkpoints,
    prune_checkpoints,
    read_metadata,
    write_checkpoint,
)
from ps.client import ModelState
from ps.consistency import Async
from ps.layout import plan_layout
from ps.rules import Ema, Rule
from ps.schedule import Constant, Horizon
from ps.shard import Shard, ShardConfig, ShardState, vector_range

shapes = st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(shapes, shapes, st.sampled_from(RULES), st.integers(0, 10**12))
def test_a_state_comes_back_bit_for_bit(tmp_path_factory, weights, statistics, rule, updates):
    folder = tmp_path_factory.mktemp("checkpoints")
    layout = ModelLayout(segments("weight", weights), segments("bn", statistics))
    state = random_state(layout, rule, updates)
    if layout.parameters[0].numel:
        state.vectors["parameters"][0] = float("nan")
    extra = {"position": {"open": [[1, 2]]}, "wall_s": 1.25, "by_worker": {10: "a", 9: "ü"}}
    path = write_checkpoint(folder, state, layout, extra)
    result = read(path, rule, layout)
    assert result.path == path
    assert result.extra == json.loads(json.dumps(extra))
    assert result.state.clocks == state.clocks
    assert set(result.state.vectors) == set(state.vectors)
    for name, vector in state.vectors.items():
        assert torch.equal(result.state.vectors[name].view(torch.int32), vector.view(torch.int32))
    metadata = read_metadata(path)
    assert (metadata["updates"], metadata["samples"]) == (updates, 32 * updates)
    assert (metadata["version_skew"], metadata["extra"]) == (2, result.extra)


def test_tensors_are_kept_by_name_for_other_tools(tmp_path):
    from safetensors.torch import load_file

    state = random_state()
    path = write_checkpoint(tmp_path, state, LAYOUT, {})
    names = {segment.name for segment in (*LAYOUT.parameters, *LAYOUT.statistics)}
    assert {file.name for file in path.iterdir()} == {
        *("model.safetensors", "ema.safetensors", "slot.momentum.safetensors", METADATA)
    }
    assert set(load_file(path / "model.safetensors")) == names
    assert set(load_file(path / "ema.safetensors")) == names
    views = named_views(state.vectors["parameters"], LAYOUT.parameters)
    for name, tensor in load_file(path / "model.safetensors").items():
        assert name.startswith("bn") or torch.equal(tensor, views[name])


def through_shards(rule: Rule, num_shards: int, state: ModelState) -> ModelState:
    """What shards that were loaded with a state say that they hold, joined."""
    parts = []
    for ranges in plan_layout(LAYOUT.parameters, LAYOUT.statistics, num_shards).shards:
        horizon = Horizon(epoch_samples=8, num_workers=1)
        config = ShardConfig(ranges, rule, Constant(lr=0.5), horizon, Ema(), Async())
        own = {n: v[vector_range(ranges, n).slice()] for n, v in state.vectors.items()}
        parts.append(Shard(config, ShardState(state.clocks, own)).capture())
    vectors = {n: torch.cat([part.vectors[n] for part in parts]) for n in parts[0].vectors}
    return ModelState(parts[0].clocks, vectors, {})


def test_all_files_are_as_readable_as_the_user_lets_files_be(tmp_path):
    before = os.umask(0o027)
    try:
        path = write_checkpoint(tmp_path, random_state(), LAYOUT, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_checkpoint_does_not_depend_on_the_number_of_shards(tmp_path, rule):
    """Neither of those that wrote it nor of those that go on from it."""
    state = random_state(rule=rule)
    written = []
    for num_shards in (1, 2, 5):
        folder = tmp_path / str(num_shards)
        path = write_checkpoint(folder, through_shards(rule, num_shards, state), LAYOUT, {"k": 1})
        written.append({file.name: file.read_bytes() for file in path.iterdir()})
        assert same(through_shards(rule, 6 - num_shards, read(path, rule).state), state)
    assert written[0] == written[1] == written[2]


class Killed(BaseException):
    """Stands for a process that ends between two operations on files."""


class FileOperations:
    """Notes the operations that change files, and ends the process at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allow_all()
        for owner, name in (
            (checkpoint, "save_file"),
            (os, "fsync"),
            (Path, "write_text"),
            (Path, "rename"),
            (Path, "mkdir"),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, self.noted(name, getattr(owner, name)))

    def noted(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            fatal = len(self.done) + 1 == self.fatal
            if fatal and self.before:
                raise self.error
            result = operation(*arguments, **keywords)
            self.done.append(name)
            if fatal:
                raise self.error
            return result

        return call

    def dying_at(self, fatal: int, *, before: bool = False, error: type = Killed) -> None:
        """Just before or just after operation number `fatal`, counted from 1."""
        self.done: list[str] = []
        self.fatal, self.before, self.error = fatal, before, error

    def allow_all(self) -> None:
        self.dying_at(0)


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> FileOperations:
    return FileOperations(monkeypatch)


@pytest.mark.parametrize(("before", "error"), [(False, Killed), (True, Killed), (True, OSError)])
def test_a_write_that_dies_leaves_the_earlier_ones_and_no_new_one(
    tmp_path, operations, before, error
):
    states = [random_state(updates=updates, seed=updates) for updates in (7, 8, 9)]
    kept = [write_checkpoint(tmp_path, state, LAYOUT, {}) for state in states[:2]]
    outcomes = set()
    for fatal in count(1):
        operations.dying_at(fatal, before=before, error=error)
        try:
            write_checkpoint(tmp_path, states[2], LAYOUT, {})
        except error:
            done = operations.done
        else:
            break
        operations.allow_all()
        found = list_checkpoints(tmp_path)
        assert found[:2] == kept
        # Complete with the rename; what follows makes that durable.
        assert len(found) == 2 + ("rename" in done)
        for path, state in zip(found, states, strict=False):
            assert same(read(path).state, state), "what is listed is whole"
        outcomes.add((*done[-1:], len(found)))
        prune_checkpoints(tmp_path, None)
        assert sorted(tmp_path.iterdir()) == found
        for path in found[2:]:
            shutil.rmtree(path)
    assert {("mkdir", 2), ("save_file", 2), ("fsync", 2), ("write_text", 2)} < outcomes
    assert ("rename", 3) in outcomes


def test_a_write_after_one_that_died_starts_clean(tmp_path, operations):
    operations.dying_at(3)
    with pytest.raises(Killed):
        write_checkpoint(tmp_path, random_state(rule=RULES[2]), LAYOUT, {})
    operations.allow_all()
    assert list(tmp_path.iterdir())
    state = random_state(seed=1)
    path = write_checkpoint(tmp_path, state, LAYOUT, {})
    assert same(read(path).state, state)
    assert list(tmp_path.iterdir()) == [path]


def test_everything_is_on_disk_before_the_name_says_so(tmp_path, monkeypatch):
    """Files, then their folder, then the rename, then the folder that holds it."""
    flushed: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def noted_rename(path: Path, target: Path) -> Path:
        flushed.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    path = write_checkpoint(tmp_path, random_state(), LAYOUT, {})
    before = set(flushed[: flushed.index("rename")])
    assert before == {file.name for file in path.iterdir()} | {f".incomplete-{path.name}"}
    assert flushed[-2:] == ["rename", tmp_path.name]


def test_prune_that_dies_leaves_only_whole_ones(tmp_path, operations):
    states = {n: random_state(updates=n, seed=n) for n in range(5)}
    for fatal in range(1, 9):
        for before in (False, True):
            folder = tmp_path / f"{fatal}-{before}"
            for state in states.values():
                write_checkpoint(folder, state, LAYOUT, {})
            operations.dying_at(fatal, before=before)
            try:
                prune_checkpoints(folder, 2)
            except Killed:
                pass
            else:
                assert fatal > 6
            operations.allow_all()
            found = list_checkpoints(folder)
            assert [path.name[-1] for path in found][-2:] == ["3", "4"]
            assert all(same(read(path).state, states[int(path.name[-1])]) for path in found)
            prune_checkpoints(folder, 2)
            assert sorted(folder.iterdir()) == found[-2:]


@pytest.mark.parametrize("num_to_keep", [1, 2, 3, 9, None])
def test_prune_keeps_the_newest_and_removes_leftovers(tmp_path, num_to_keep):
    paths = [
        write_checkpoint(tmp_path, random_state(updates=n), LAYOUT, {}) for n in (3, 20, 100, 9)
    ]
    for leftover in (".incomplete-checkpoint-000000005", ".incomplete-checkpoint-x"):
        (tmp_path / leftover / "sub").mkdir(parents=True)
    (tmp_path / "mine.txt").write_text("kept")
    in_order = [paths[0], paths[3], paths[1], paths[2]]
    assert list_checkpoints(tmp_path) == in_order
    prune_checkpoints(tmp_path, num_to_keep)
    kept = in_order[-num_to_keep:] if num_to_keep else in_order
    assert list_checkpoints(tmp_path) == kept
    assert set(tmp_path.iterdir()) == {*kept, tmp_path / "mine.txt"}


def test_folders_without_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []
    prune_checkpoints(tmp_path / "none", 1)
    (tmp_path / "checkpoint-000000001").mkdir()
    (tmp_path / "checkpoint-2").write_text("a file")
    assert list_checkpoints(tmp_path) == []


def test_nothing_is_ever_overwritten(tmp_path):
    """Also when the run went back, and came to the same number of updates many times."""
    written: list[tuple[Path, ModelState]] = []
    for seed in range(12):
        state = random_state(seed=seed)
        written.append((write_checkpoint(tmp_path, state, LAYOUT, {}), state))
    assert list_checkpoints(tmp_path) == [path for path, _ in written]
    assert all(same(read(path).state, state) for path, state in written)
    later = write_checkpoint(tmp_path, random_state(updates=8), LAYOUT, {})
    assert list_checkpoints(tmp_path)[-1] == later


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([7, 7, 8]), max_size=8), st.integers(1, 3))
def test_the_newest_is_never_pruned(tmp_path_factory, updates, num_to_keep):
    folder = tmp_path_factory.mktemp("checkpoints")
    newest: dict[int, Path] = {}
    for number in updates:
        newest[number] = write_checkpoint(folder, random_state(updates=number), LAYOUT, {})
        prune_checkpoints(folder, num_to_keep)
        found = list_checkpoints(folder)
        assert found[-1] == newest[max(newest)]
