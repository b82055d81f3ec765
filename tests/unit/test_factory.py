"""A user's own model: loaded by file, the same in every process, one line for what is wrong."""

import pickle
import sys
from pathlib import Path

import pytest
import torch

from asynception.building import build_flat
from asynception.config import ModelConfig, TrainConfig
from asynception.plan import plan_model
from asynception.recipe import FACTORY_FILE, load_config, save_config
from model.errors import InputError
from model.factory import Factory, read_factory

GOOD = """
from dataclasses import dataclass

from torch import nn

@dataclass
class Widths:
    hidden: int = 4

class Net(nn.Module):
    def __init__(self, num_classes, widths):
        super().__init__()
        self.conv = nn.Conv2d(3, widths.hidden, 3)
        self.dense = nn.Linear(widths.hidden, num_classes)

    def forward(self, images):
        return self.dense(self.conv(images).mean((2, 3)))

def build(num_classes, hidden=4):
    return Net(num_classes, Widths(hidden))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    return path


def config_of(factory, **settings):
    return TrainConfig.model_validate(
        {
            "model": {"factory": str(factory), **settings},
            "data": {"train": "/a", "val": "/b", "image_size": 16},
            "training": {"epochs": 1},
        }
    )


def message(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def plan_of(source, **settings):
    factory = Factory("/nowhere/mine.py", "build", source)
    return factory.build_twice(3, settings)


def test_a_model_of_ones_own_is_built_with_its_settings(file):
    plan = plan_model(config_of(f"{file}:build", hidden=6), 5)
    shapes = {segment.name: segment.shape for segment in plan.tensors.parameters}
    assert shapes == {
        "conv.weight": (6, 3, 3, 3),
        "conv.bias": (6,),
        "dense.weight": (5, 6),
        "dense.bias": (5,),
    }


def test_the_text_travels_with_the_config_and_not_the_file(file):
    config = config_of(f"{file}:build")
    expected = build_flat(config, 3).parameters.clone()
    sent = pickle.dumps(config)
    file.write_text("raise SystemError('changed since')")
    received = pickle.loads(sent)
    file.unlink()
    assert received == config
    assert torch.equal(build_flat(received, 3).parameters, expected)


def test_a_run_keeps_the_file_it_was_trained_with(file, tmp_path):
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    save_config(config_of(f"{file}:build", hidden=2), run)
    file.unlink()
    moved = run.rename(tmp_path / "moved")
    config = load_config(moved)
    assert config.model.factory == f"{moved / FACTORY_FILE}:build"
    assert config.model.factory_source == GOOD
    assert config.model.settings == {"hidden": 2}
    save_config(config, moved)
    assert load_config(moved) == config


def test_paths_start_at_the_recipe_and_overrides_at_the_working_directory(
    file, tmp_path, monkeypatch
):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[model]\nfactory = "mine.py:build"\nhidden = 2\n'
        '[data]\ntrain = "a"\nval = "b"\n[training]\nepochs = 1\n'
    )
    assert load_config(recipe).model.factory == f"{file}:build"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.py").write_text(GOOD.replace("def build", "def other"))
    monkeypatch.chdir(elsewhere)
    config = load_config(recipe, ["--model.factory", "other.py:other"])
    assert config.model.factory == f"{elsewhere / 'other.py'}:other"
    assert config.model.settings == {}, "another model takes none of the recipe's settings over"
    assert load_config(recipe, ["--model.hidden", "3"]).model.settings == {"hidden": 3}


def test_another_registered_model_takes_no_settings_over(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[model]\nwidth = 0.5\n[data]\ntrain = 'a'\nval = 'b'\n[training]\nepochs = 1\n"
    )
    assert load_config(recipe).model.settings == {"width": 0.5}
    with pytest.raises(InputError, match="model 'incption' is unknown"):
        load_config(recipe, ["--model.name", "incption"])
    assert load_config(recipe, ["--model.name", "timm:resnet18"]).model.settings == {}
    same = load_config(recipe, ["--model.name", "xception"])
    assert same.model.settings == {"width": 0.5}, "the recipe's model, by its name"


def test_a_registered_model_replaces_a_factory(file, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[model]\nfactory = 'mine.py:build'\nhidden = 2\n"
        "[data]\ntrain = 'a'\nval = 'b'\n[training]\nepochs = 1\n"
    )
    for override in (["--model.name", "xception"], ["--model.factory", "none"]):
        config = load_config(recipe, override)
        assert (config.model.name, config.model.factory) == ("xception", None)
        assert config.model.settings == {}


def test_two_models_at_once_are_refused(file):
    with pytest.raises(ValueError, match="are two models"):
        ModelConfig(name="timm:resnet18", factory=f"{file}:build")


def test_a_config_with_a_factory_survives_a_dump(file):
    config = config_of(f"{file}:build", hidden=3)
    assert TrainConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("setting", ["mine.py", ":build", "mine.py:", "mine.py:a b"])
def test_a_setting_that_names_no_function_is_refused(setting):
    assert "path/to/file.py:function" in message(read_factory, setting)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "absent.py"
    assert str(path) in message(read_factory, f"{path}:build")


def test_a_missing_function_is_named(file):
    text = message(read_factory(f"{file}:built").build, 3, {})
    assert "defines no function 'built'" in text


def test_what_the_file_raises_is_shown_with_its_line():
    text = message(plan_of, "import torch\n\nimport not_there_at_all\n")
    assert "failed at line 3: ModuleNotFoundError" in text
    text = message(plan_of, "def build(num_classes):\n    return {}['missing']\n")
    assert "failed at line 2: KeyError: 'missing'" in text
    assert "SyntaxError" in message(plan_of, "def build(:")


def test_a_file_that_failed_is_not_remembered_as_loaded():
    before = {name for name in sys.modules if name.startswith("asynception_user_")}
    source = "raise ValueError('once')"
    for _ in range(2):
        assert "ValueError: once" in message(plan_of, source)
    after = {name for name in sys.modules if name.startswith("asynception_user_")}
    assert after == before


def test_settings_that_the_function_does_not_take_are_named():
    with pytest.raises(InputError, match=r"\{'depth': 3\}.*unexpected keyword argument 'depth'"):
        plan_of(GOOD, depth=3)


@pytest.mark.parametrize(("value", "kind"), [("None", "NoneType"), ("[1]", "list")])
def test_what_is_not_a_module_is_refused(value, kind):
    assert f"returned a {kind}" in message(plan_of, f"def build(n): return {value}")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("3, 3 + len(calls)", "0.weight"),
        ("3, 3, **({} if len(calls) < 2 else {'bias': False})", "0.bias"),
    ],
)
def test_parameters_that_change_between_calls_are_refused(change, name):
    source = (
        "from torch import nn\ncalls = []\n"
        f"def build(n):\n    calls.append(n)\n    return nn.Sequential(nn.Linear({change}))\n"
    )
    text = message(plan_of, source)
    assert "at its second call" in text
    assert repr(name) in text


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("return self.dense(images.mean((2, 3)))[:, :1]", "(1, 1)"),
        ("return self.dense(images.mean((2, 3))), None", "tuple"),
    ],
)
def test_what_is_not_logits_is_refused_before_the_start(tmp_path: Path, body, shown):
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self, n):\n        super().__init__()\n"
        "        self.dense = nn.Linear(3, n)\n"
        f"    def forward(self, images):\n        {body}\n"
    )
    text = message(plan_model, config_of(f"{path}:Net"), 4)
    assert shown in text
    assert "(1, 4)" in text


def test_a_forward_pass_that_fails_is_one_line(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\ndef build(n):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, n))\n"
    )
    text = message(plan_model, config_of(f"{path}:build"), 4)
    assert "16x16" in text
    assert "RuntimeError" in text


def test_a_model_without_parameters_is_refused(tmp_path):
    path = tmp_path / "net.py"
    path.write_text("from torch import nn\ndef build(n): return nn.Flatten()\n")
    assert "nothing to train" in message(plan_model, config_of(f"{path}:build"), 4)
