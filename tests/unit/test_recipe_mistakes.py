"""One line for whatever is wrong in a recipe or an override."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_trees import COMPLETE, KNOWN_KEYS, SMALLEST, around, message, with_key

from asynception.config import TrainConfig
from asynception.recipe import (
    load_config,
    parse_overrides,
    validate,
)


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
