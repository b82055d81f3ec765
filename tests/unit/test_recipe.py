"""Recipes and overrides: what is read and what is kept."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_trees import KNOWN_KEYS, SMALLEST, message, own_keys, write

from asynception.config import TrainConfig
from asynception.recipe import (
    CONFIG_FILE,
    describe_settings,
    known_keys,
    load_config,
    parse_overrides,
    save_config,
    validate,
)


def test_no_setting_was_renamed():
    assert [key for key in known_keys() if key not in own_keys()] == KNOWN_KEYS
    assert set(own_keys()) <= set(known_keys())
    assert {"model.width", "model.middle_blocks", "model.dropout"} <= set(own_keys())


def test_every_setting_is_described():
    described = dict(describe_settings())
    assert list(described) == known_keys()
    for key, text in described.items():
        assert "\n" not in text
        assert key in own_keys() or re.fullmatch(r".+\((required|default .+)\)", text), key
    assert described["data.val"].endswith("(required)")
    assert described["scaling.num_workers"].endswith("(default 2)")
    assert described["checkpoint.every_epochs"].endswith("(default none)")


def test_a_recipe_and_overrides(tmp_path):
    recipe = write(
        tmp_path,
        {
            **SMALLEST,
            "model": {"name": "xception", "width": 0.25},
            "optimizer": {"name": "rmsprop", "rho": 0.8},
            "scaling": {"resources_per_worker": {"CPU": 2.0, "memory": 1e9}},
            "run": {"name": "mine"},
        },
    )
    config = load_config(
        recipe,
        [
            *("--optimizer.rho", "0.95", "--optimizer.momentum=0.5", "--training.epochs=2.5"),
            *("--schedule.kind", "cosine", "--schedule.lr=1e-3", "--schedule.length", "10"),
            *("--data.augment.horizontal_flip", "true", "--model.middle_blocks=2"),
            *("--scaling.resources_per_worker.CPU", "4", "--failure.max_failures", "-1"),
        ],
    )
    assert (config.optimizer.name, config.optimizer.rho) == ("rmsprop", 0.95)
    assert config.optimizer.momentum == 0.5
    assert (config.training.epochs, config.training.samples) == (2.5, None)
    assert (config.schedule.kind, config.schedule.lr) == ("cosine", 1e-3)
    assert config.data.augment.horizontal_flip is True
    assert config.model.settings == {"width": 0.25, "middle_blocks": 2}
    assert config.scaling.worker_resources == {"CPU": 4.0, "memory": 1e9}
    assert config.failure.max_failures == -1
    assert config.run.name == "mine"


def test_overrides_are_toml_values_or_plain_strings():
    assert parse_overrides(
        [
            *("--a.int", "-3", "--a.float=2.5e3", "--a.bool", "false", "--a.list", '["x", 1]'),
            *("--a.text", "xception", "--a.path=/data/train-{00..06}.tar", "--a.quoted", '"5"'),
            *("--a.equals=x=y", "--a.empty=", "--a.day", "2024-01-02", "--a.noon=12:00:00"),
            *("--b.c.d", "1", "--b.c.e", "2", "--a.int", "4", "--a.url", "ray://host:1"),
        ]
    ) == {
        "a": {
            "int": 4,
            "float": 2500.0,
            "bool": False,
            "list": ["x", 1],
            "text": "xception",
            "path": "/data/train-{00..06}.tar",
            "quoted": "5",
            "equals": "x=y",
            "empty": "",
            "day": "2024-01-02",
            "noon": "12:00:00",
            "url": "ray://host:1",
        },
        "b": {"c": {"d": 1, "e": 2}},
    }


def test_data_paths_start_at_the_recipe_or_at_the_working_directory(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    tree = {"data": {"train": "../train-*.tar", "val": "/val"}, "training": {"epochs": 1}}
    write(there, tree)
    monkeypatch.chdir(here)
    for recipe in (Path("../there/recipe.toml"), there / "recipe.toml"):
        config = load_config(recipe)
        assert (config.data.train, config.data.val) == (f"{tmp_path}/train-*.tar", "/val")
        config = load_config(recipe, ["--data.val", "images", "--data.train=./x/../y"])
        assert (config.data.train, config.data.val) == (f"{here}/y", f"{here}/images")


@pytest.mark.parametrize(
    ("file", "start"),
    [
        ("emoji.toml", "emoji-"),
        ("my recipe (2).toml", "my-recipe-2--"),
        ("_x.toml", "x-"),
        ("ü.toml", "run-"),
    ],
)
def test_a_run_is_named_for_its_recipe_and_the_time(tmp_path, file, start):
    config = load_config(write(tmp_path, SMALLEST, file))
    assert re.fullmatch(re.escape(start) + r"\d{8}-\d{6}", config.run.name)
    assert TrainConfig.model_validate(config.model_dump()) == config


positive = st.floats(0, exclude_min=True, allow_infinity=True)
shares = st.floats(0, 1, exclude_max=True)
counts = st.integers(1, 10**9)
rules = st.one_of(
    st.fixed_dictionaries({"name": st.just("sgd")}, optional={"weight_decay": shares}),
    st.fixed_dictionaries({"name": st.just("momentum")}, optional={"momentum": shares}),
    st.fixed_dictionaries(
        {"name": st.just("rmsprop")}, optional={"rho": shares, "epsilon": positive}
    ),
)
schedules = st.one_of(
    st.fixed_dictionaries({"kind": st.just("constant"), "lr": positive}),
    st.fixed_dictionaries(
        {"kind": st.just("exponential"), "lr": positive}, optional={"staircase": st.booleans()}
    ),
    st.fixed_dictionaries({"kind": st.just("cosine"), "lr": positive, "length": positive}),
)
trees = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {"train": st.just('/data/"quoted" ü\\n\'.tar'), "val": st.just("/val")},
            optional={"batch_size": counts, "num_classes": st.none() | counts},
        ),
        "training": st.one_of(
            st.fixed_dictionaries({"epochs": positive}, optional={"clip_norm": positive}),
            st.fixed_dictionaries({"samples": counts, "epochs": st.none()}),
        ),
    },
    optional={
        "model": st.fixed_dictionaries(
            {}, optional={"width": st.floats(0.1, 4), "name": st.just("xception")}
        ),
        "optimizer": rules,
        "schedule": schedules,
        "consistency": st.fixed_dictionaries({}, optional={"max_staleness": st.none() | counts}),
        "scaling": st.fixed_dictionaries(
            {}, optional={"resources_per_worker": st.dictionaries(st.text(), shares, max_size=3)}
        ),
        "checkpoint": st.fixed_dictionaries(
            {}, optional={"num_to_keep": st.none() | counts, "every_s": st.none() | positive}
        ),
        "ray": st.fixed_dictionaries({}, optional={"address": st.none() | st.just("auto")}),
    },
)


@settings(deadline=None)
@given(trees, st.sampled_from(["run", "a.b-c_D9"]))
def test_a_saved_config_is_read_back_as_it_was(tmp_path_factory, tree, name):
    storage = tmp_path_factory.mktemp("runs")
    (storage / name).mkdir()
    config = validate(tree | {"run": {"storage_path": str(storage), "name": name}})
    save_config(config, storage / name)
    assert [path.name for path in (storage / name).iterdir()] == [CONFIG_FILE]
    assert load_config(storage / name) == config
    assert load_config(storage / name / CONFIG_FILE) == config
    saved = tomllib.loads((storage / name / CONFIG_FILE).read_text("utf-8"))
    assert set(saved) == set(TrainConfig.model_fields), "the resolved config is complete"


def test_a_run_is_where_its_folder_is(tmp_path, monkeypatch):
    config = validate({**SMALLEST, "run": {"name": "first", "storage_path": "runs"}})
    moved = tmp_path / "elsewhere" / "second"
    moved.mkdir(parents=True)
    save_config(config, moved)
    monkeypatch.chdir(moved)
    for folder in (moved, Path("../second"), Path()):
        run = load_config(folder).run
        assert (run.storage_path, run.name) == (str(moved.parent), "second")
    assert load_config(moved, ["--run.name", "third"]).run.name == "third"


def test_a_config_built_in_python_is_saved_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = validate({"data": {"train": "a", "val": "../b"}, "training": {"epochs": 1}})
    save_config(config, tmp_path)
    data = load_config(tmp_path).data
    assert (data.train, data.val) == (f"{tmp_path}/a", f"{tmp_path.parent}/b")


def test_a_kill_while_saving_leaves_the_config_that_was_there(tmp_path, monkeypatch):
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    config = validate({**SMALLEST, "run": {"name": "run", "storage_path": str(tmp_path)}})
    save_config(config, tmp_path)
    before = (tmp_path / CONFIG_FILE).read_bytes()
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_config(validate(SMALLEST), tmp_path)
    assert (tmp_path / CONFIG_FILE).read_bytes() == before


def test_none_takes_a_setting_back(tmp_path):
    recipe = write(
        tmp_path, SMALLEST | {"checkpoint": {"num_to_keep": "none"}, "run": {"name": "none"}}
    )
    config = load_config(recipe, ["--training.epochs", "none", "--training.samples=64"])
    assert (config.training.epochs, config.training.samples) == (None, 64)
    assert config.checkpoint.num_to_keep is None
    assert config.run.name.startswith("recipe-")
    text = message(load_config, recipe, ["--data.batch_size", "none"])
    assert text.startswith("data.batch_size = 'none': ")


def test_recipes_are_utf8_whatever_the_locale(tmp_path, monkeypatch):
    tree = {**SMALLEST, "data": {"train": "/бild", "val": "/b"}}
    recipe = write(tmp_path, tree)
    monkeypatch.setattr("io.text_encoding", lambda given, *_: given or "latin-1")
    assert load_config(recipe).data.train == "/бild"
