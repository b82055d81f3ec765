"""Recipes and overrides: what is read, what is kept, and one line for whatever is wrong."""

import copy
import math
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

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
from model.errors import InputError
from model.registry import model_setting_names

PINNED = """
model.name model.factory model.weights
data.train data.val data.num_classes data.image_size data.batch_size data.shuffle_window
data.resize.mode data.resize.crop_fraction data.augment.horizontal_flip data.augment.max_shift
data.augment.crop data.augment.crop_area data.augment.crop_ratio data.augment.brightness
data.augment.contrast data.augment.saturation data.augment.hue data.max_corrupt
data.max_lost_shards data.max_pixels data.fetch.cache_dir data.fetch.cache_gb data.fetch.timeout_s
data.fetch.stall_s data.fetch.attempts data.fetch.backoff_s data.fetch.retry_lost_s
data.fetch.num_threads data.fetch.verify data.fetch.storage_options data.cached_shards
data.cache_images_mb data.num_threads data.prefetch_batches data.lease data.lease_batches
training.objective training.label_smoothing training.label_weights training.epochs
training.samples training.max_s training.accumulate_grad_batches training.clip_norm training.seed
training.max_not_finite training.on_divergence training.rollback_lr_factor
training.max_rollbacks
optimizer.weight_decay optimizer.name optimizer.momentum optimizer.nesterov optimizer.rho
optimizer.epsilon optimizer.betas
schedule.lr schedule.unit schedule.warmup schedule.kind schedule.decay schedule.every
schedule.staircase schedule.length schedule.final
ema.decay ema.warmup
consistency.mode consistency.staleness_lr consistency.delay_compensation
consistency.max_staleness consistency.ramp_up_epochs consistency.slack
consistency.backup_workers consistency.deterministic consistency.local_steps
consistency.outer_lr consistency.outer_momentum consistency.asynchronous consistency.moving_rate
consistency.publish_every_s consistency.timeout_s consistency.bucket_mb
consistency.find_unused_parameters
compute.channels_last compute.precision compute.compile
evaluation.every_epochs evaluation.batch_size evaluation.raw evaluation.map_k
evaluation.class_weights evaluation.classes evaluation.cpus
scaling.num_workers scaling.processes_per_worker scaling.num_servers scaling.replicas
scaling.use_gpu scaling.resources_per_worker scaling.resources_per_server scaling.placement_strategy
scaling.spread_servers scaling.slow_workers
run.name run.storage_path run.log_every_s run.detached run.placement_timeout_s
checkpoint.path checkpoint.storage_options checkpoint.num_to_keep checkpoint.every_epochs
checkpoint.every_s
failure.max_failures failure.salvage_s failure.server_timeout_s failure.max_worker_failures
failure.max_fruitless_failures failure.worker_timeout_s
network.attempt_s network.deadline_s network.backoff_s
lanes.choice lanes.port_range
pipeline.overlap pipeline.early_push
wire.pull wire.push wire.error_feedback
security.tls security.authority_file security.certificate_file security.key_file
ray.address
monitoring.prometheus monitoring.port monitoring.wandb_project monitoring.mlflow_uri
monitoring.mlflow_experiment
"""
KNOWN_KEYS = PINNED.split()
"""The settings that recipes out there may hold: renaming or removing one breaks them."""

SMALLEST = {"data": {"train": "/a", "val": "/b"}, "training": {"epochs": 1}}

COMPLETE = {
    **SMALLEST,
    "optimizer": {"name": "rmsprop"},
    "schedule": {"kind": "exponential", "lr": 0.1},
}
"""With sections of which one setting decides which others there are."""

MEMBERS = {
    "schedule.length": {"kind": "cosine", "length": 1.0, "lr": 0.1},
    "schedule.final": {"kind": "cosine", "length": 1.0, "lr": 0.1},
    "consistency.slack": {"mode": "bounded"},
    "consistency.backup_workers": {"mode": "sync"},
    "consistency.deterministic": {"mode": "sync"},
    "consistency.local_steps": {"mode": "averaging"},
    "consistency.outer_lr": {"mode": "averaging"},
    "consistency.outer_momentum": {"mode": "averaging"},
    "consistency.asynchronous": {"mode": "averaging"},
    "consistency.moving_rate": {"mode": "elastic"},
    "consistency.publish_every_s": {"mode": "allreduce"},
    "consistency.timeout_s": {"mode": "allreduce"},
    "consistency.bucket_mb": {"mode": "allreduce"},
    "consistency.find_unused_parameters": {"mode": "allreduce"},
    "optimizer.nesterov": {"name": "momentum"},
    "optimizer.betas": {"name": "adam"},
}


def around(key: str) -> dict[str, Any]:
    """A complete recipe in which `key` may be set."""
    tree = copy.deepcopy(COMPLETE)
    if key in MEMBERS:
        tree[key.partition(".")[0]] = dict(MEMBERS[key])
    return tree


def with_key(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *sections, leaf = key.split(".")
    inner = tree = copy.deepcopy(tree)
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[leaf] = value
    return tree


def write(folder: Path, tree: dict[str, Any], name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_bytes(tomli_w.dumps(tree).encode())
    return path


def message(call: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def own_keys() -> list[str]:
    return [f"model.{name}" for name in model_setting_names()]


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


@pytest.mark.parametrize("key", KNOWN_KEYS)
def test_a_mistyped_setting_is_met_with_the_nearest(key):
    typed = key + key[-1]
    text = message(validate, with_key(around(key), typed, 1))
    if key.startswith("model."):
        assert f"{typed.partition('.')[2]!r} is unknown to model 'xception'" in text
    else:
        assert text == f"{typed} is not a known setting; did you mean {key}?"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("optimiser.name", "optimiser is not a known setting; did you mean optimizer?"),
        ("training.lr", "training.lr is not a known setting; did you mean schedule.lr?"),
        (
            "batch_size",
            "batch_size is not a known setting; did you mean data.batch_size or "
            "evaluation.batch_size?",
        ),
        ("qqqqq", "qqqqq is not a known setting; see asynception train --help"),
        ("ray.two\nlines", "ray.two lines is not a known setting; "),
        ("ray.qqqqq", "ray.qqqqq is not a known setting; see asynception train --help"),
        ("model.widht", "(did you mean 'width'?)"),
        ("data.augment.horizontal_flop", "did you mean data.augment.horizontal_flip?"),
    ],
)
def test_an_unknown_setting(key, expected):
    assert expected in message(validate, with_key(SMALLEST, key, 1))


@pytest.mark.parametrize("key", KNOWN_KEYS)
@pytest.mark.parametrize("value", [[], [1, "a\nb"]])
def test_a_value_of_a_wrong_type_is_named(key, value):
    text = message(validate, with_key(around(key), key, value))
    assert text.startswith(f"{key} = ")
    assert len(text) > len(f"{key} = {value}: ")


@pytest.mark.parametrize("section", TrainConfig.model_fields)
@pytest.mark.parametrize("value", [5, "text", [1]])
def test_a_section_must_be_one(section, value):
    assert message(validate, {**SMALLEST, section: value}).startswith(f"{section} = {value!r}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.batch_size", 0),
        ("training.label_smoothing", 1),
        ("optimizer.rho", 1.0),
        ("ema.decay", -0.1),
        ("scaling.placement_strategy", "PACKED"),
        ("scaling.resources_per_worker.CPU", -1),
        ("run.name", "../x"),
        ("training.epochs", math.nan),
        ("failure.max_failures", -2),
        ("checkpoint.every_s", 0),
    ],
)
def test_a_value_out_of_range_is_named(key, value):
    text = message(validate, with_key(COMPLETE, key, value))
    assert text.startswith(f"{key} = {value!r}: input should ") or "should match" in text


def test_the_objective_decides_about_label_smoothing():
    text = message(validate, with_key(SMALLEST, "training.label_smoothing", 0.1))
    assert "training.label_smoothing has no effect with objective multilabel" in text
    softmax = with_key(SMALLEST, "training.objective", "softmax")
    assert validate(with_key(softmax, "training.label_smoothing", 0.1))


@pytest.mark.parametrize(
    ("section", "given", "expected"),
    [
        ("optimizer", {"rho": 0.9}, "optimizer.name is missing: set it beside"),
        ("optimizer", {"name": "lamb"}, "optimizer.name = 'lamb': choose one of 'sgd', "),
        ("optimizer", {"name": "sgd", "rho": 0.9}, "optimizer.rho is not a setting of 'sgd'"),
        ("schedule", {"kind": "cosine"}, "schedule.lr is missing: set it in the recipe or with "),
        ("schedule", {"kind": "cosine", "lr": 1}, "schedule.length is missing: "),
        ("schedule", {"lr": 1}, "schedule.kind is missing: "),
        ("schedule", {"kind": "cosine", "lr": -1, "length": 1}, "schedule.lr = -1: input should "),
        ("schedule", {"kind": "constant", "lr": 1, "final": 0}, "schedule.final is not a setting"),
        ("model", {"name": "xeption"}, "model 'xeption' is unknown (did you mean 'xception'?)"),
        ("model", {"width": -1}, "setting width = -1 of model 'xception' cannot be used"),
    ],
)
def test_settings_that_depend_on_another(section, given, expected):
    assert message(validate, {**SMALLEST, section: given}).startswith(expected)


def test_an_unknown_setting_is_reported_before_the_one_that_it_leaves_missing():
    tree = {"data": {"train": "/a", "vall": "/b"}, "training": {"epochs": 1}}
    assert message(validate, tree) == "data.vall is not a known setting; did you mean data.val?"


def test_what_a_recipe_must_have():
    assert message(validate, {"training": {"epochs": 1}}) == (
        "data is missing: the recipe needs a section [data]"
    )
    assert message(validate, {"data": SMALLEST["data"]}) == (
        "training is missing: the recipe needs a section [training]"
    )
    for key in ("train", "val"):
        data = {name: path for name, path in SMALLEST["data"].items() if name != key}
        assert message(validate, {**SMALLEST, "data": data}) == (
            f"data.{key} is missing: set it in the recipe or with --data.{key} VALUE"
        )


@pytest.mark.parametrize("training", [{}, {"epochs": 1, "samples": 10}])
def test_exactly_one_budget(training):
    text = message(validate, {**SMALLEST, "training": training})
    assert text.startswith("give exactly one of training.epochs and training.samples")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train"], "argument 'train': expected --section.key value"),
        (["--resume"], "argument '--resume': expected --section.key value"),
        (["-training.epochs", "1"], "argument '-training.epochs'"),
        (["--training.epochs"], "option --training.epochs needs a value"),
        (["--a.b", "--training.epochs", "1"], "option --a.b needs a value"),
        (["--a.b", "1", "--a.b.c", "2"], "option --a.b.c: b was given a value of its own"),
        (["--a.b", "1", "2"], "argument '2'"),
    ],
)
def test_overrides_that_are_none(overrides, expected):
    assert message(parse_overrides, overrides).startswith(expected)


def test_recipes_that_cannot_be_read(tmp_path):
    missing = tmp_path / "missing.toml"
    text = message(load_config, missing)
    assert text == f"recipe {missing}: No such file or directory; name a .toml file"
    assert "Is a directory" in message(load_config, tmp_path)
    path = tmp_path / "recipe.toml"
    for damage in (b"[data\ntrain=1", b"a = \xff", b"a = 1\na = 2", b'a = "x\n'):
        path.write_bytes(damage)
        assert message(load_config, path).startswith(f"recipe {path} is not valid TOML: ")


def test_recipes_are_utf8_whatever_the_locale(tmp_path, monkeypatch):
    tree = {**SMALLEST, "data": {"train": "/бild", "val": "/b"}}
    recipe = write(tmp_path, tree)
    monkeypatch.setattr("io.text_encoding", lambda given, *_: given or "latin-1")
    assert load_config(recipe).data.train == "/бild"


names = (
    st.text()
    | st.sampled_from([*KNOWN_KEYS])
    | st.sampled_from([*TrainConfig.model_fields, *(key.rpartition(".")[2] for key in KNOWN_KEYS)])
)
scalars = st.none() | st.booleans() | st.integers() | st.text()
nonsense = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=8
)


def test_a_key_in_quotes_is_no_path():
    said = message(validate, {**SMALLEST, "data.image_size": 64})
    assert (
        said == '"data.image_size" in quotes is not a setting: write data.image_size without them'
    )


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(names, nonsense | st.dictionaries(names, nonsense)))
def test_nonsense_gets_one_line(tree):
    message(validate, {"data": {"train": 1}} | tree | {"evaluation": []})
