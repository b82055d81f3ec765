"""What the command line of a comparison says, and which runs follow from it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynception.compare.grid import plan_runs
from asynception.compare.groups import differing, flat_settings
from asynception.compare.options import (
    Conditions,
    check_budget,
    mode_names,
    mode_settings,
    parse_duration,
    parse_modes,
    parse_slow,
    split_consistency,
)
from model.errors import InputError

RECIPE = """
[data]
train = "t"
val = "v"
[training]
epochs = 3
seed = 5
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@given(st.floats(0.001, 1e4).map(lambda value: round(value, 3)), st.sampled_from("smh"))
def test_a_duration_is_its_number_times_its_unit(value, unit):
    seconds = {"s": 1, "m": 60, "h": 3600}[unit]
    assert math.isclose(parse_duration(f"{value:f}{unit}"), value * seconds)


@pytest.mark.parametrize("text", ["10", "m", "0s", "-1m", "10 min", "1e3s", "10d", ""])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(InputError, match="--budget"):
        parse_duration(text)


def test_a_budget_is_of_time_or_of_samples():
    assert check_budget(None, "2m") == 120
    assert check_budget(7, None) is None
    with pytest.raises(InputError, match="give one of them"):
        check_budget(7, "2m")


@given(st.dictionaries(st.integers(0, 99), st.integers(1, 50), max_size=4))
def test_slow_workers_are_read_as_they_are_written(slow):
    assert parse_slow(f"{worker}x{factor}" for worker, factor in slow.items()) == slow


@pytest.mark.parametrize("texts", [["1"], ["x2"], ["1x"], ["1x0.5"], ["1x2", "1x3"], ["-1x2"]])
def test_what_names_no_slow_worker_is_refused(texts):
    with pytest.raises(InputError, match="--slow"):
        parse_slow(texts)


def test_modes_are_those_of_the_settings():
    assert {"async", "sync"} <= set(mode_names())
    assert parse_modes(" sync, async ") == ["sync", "async"]
    assert mode_settings("sync") >= {"backup_workers"}
    assert "mode" not in mode_settings("sync")


@pytest.mark.parametrize("text", ["", ",", "sync,sync", "sync,asynk"])
def test_modes_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="--modes"):
        parse_modes(text)


def test_settings_of_consistency_are_taken_out_with_their_values():
    words = ["--data.batch_size", "8", "--consistency.backup_workers=1", "--consistency.x", "2"]
    rest, consistency = split_consistency([*words, "--training.seed=3"])
    assert rest == ["--data.batch_size", "8", "--training.seed=3"]
    assert consistency == [["--consistency.backup_workers=1"], ["--consistency.x", "2"]]
    with pytest.raises(InputError, match="--modes chooses"):
        split_consistency(["--consistency.mode", "sync"])


def test_runs_are_interleaved_by_seed_and_differ_in_mode_and_seed_alone(recipe, tmp_path):
    planned = plan_runs(recipe, ["sync", "async"], Conditions(3, 640), [], tmp_path / "out")
    assert [run.name for run in planned] == [
        f"{mode}-seed{seed}" for seed in (5, 6, 7) for mode in ("sync", "async")
    ]
    flat = [flat_settings(run.config) for run in planned]
    assert {key.partition(".")[0] for key in differing(flat)} == {"consistency", "training"}
    assert [each["training.seed"] for each in flat] == [5, 5, 6, 6, 7, 7]
    assert differing([flat[0], flat[2]]) == ["training.seed"]
    assert all(each["training.samples"] == 640 for each in flat)
    assert all(each["training.epochs"] is None for each in flat)
    assert len({run.folder for run in planned}) == 6
    assert all(run.folder.parent == tmp_path / "out" / "runs" for run in planned)


def test_a_mode_takes_only_settings_that_it_knows(recipe, tmp_path):
    overrides = ["--consistency.backup_workers", "1", "--consistency.max_staleness=4"]
    planned = plan_runs(recipe, ["sync", "async"], Conditions(1), overrides, tmp_path)
    sync, at_once = (run.config.consistency for run in planned)
    assert (sync.mode, sync.backup_workers) == ("sync", 1)
    assert (at_once.mode, at_once.max_staleness) == ("async", 4)
    with pytest.raises(InputError, match=r"consistency\.max_staleness"):
        plan_runs(recipe, ["sync"], Conditions(1), overrides, tmp_path)


def test_what_a_recipe_says_of_its_own_mode_is_nothing_to_another(recipe, tmp_path):
    recipe.write_text(recipe.read_text() + '[consistency]\nmode = "sync"\nbackup_workers = 1\n')
    planned = plan_runs(recipe, ["async", "sync"], Conditions(1), [], tmp_path)
    at_once, sync = (run.config.consistency for run in planned)
    assert at_once == type(at_once)()
    assert sync.backup_workers == 1


def test_a_setting_that_a_mode_refuses_is_one_line(recipe, tmp_path):
    with pytest.raises(InputError, match=r"consistency\.backup_workers = 2"):
        plan_runs(recipe, ["sync"], Conditions(1), ["--consistency.backup_workers", "2"], tmp_path)


def test_conditions_are_settings_of_training():
    conditions = Conditions(1, None, 90.0, {1: 20.0})
    assert conditions.overrides() == [
        *("--training.max_s", "90.0"),
        *("--data.lease_batches", "1"),
        *("--data.prefetch_batches", "1"),
        *("--scaling.slow_workers.1", "20.0"),
    ]
    assert Conditions().overrides() == []
