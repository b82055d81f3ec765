"""Models of timm and torchvision, which need not be there."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from torch import nn

from asynception.config_inputs import ModelConfig
from model.errors import InputError
from model.registry import create_model


def stub(**members):
    module = ModuleType("stub")
    vars(module).update(members)
    return module


def build(name, num_classes, **settings):
    if name != "tiny":
        raise RuntimeError(f"Unknown model ({name})")
    return nn.Linear(settings.get("width", 3), num_classes)


@pytest.fixture(params=["timm", "torchvision"])
def library(request, monkeypatch):
    """A library of that name with one model, where the real one can't be imported."""
    members = {"create_model": build, "models": SimpleNamespace(get_model=build)}
    monkeypatch.setitem(sys.modules, request.param, stub(**members))
    return request.param


def message(name, **settings):
    with pytest.raises(InputError) as caught:
        create_model(name, 5, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_gets_its_classes_and_settings(library):
    module = create_model(f"{library}:tiny", 5, width=7)
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (7, 5)
    built = ModelConfig.model_validate({"name": f"{library}:tiny", "width": 2}).build(4)
    assert isinstance(built, nn.Linear)
    assert (built.in_features, built.out_features) == (2, 4)


def test_what_the_library_refuses_is_passed_on(library):
    assert "Unknown model (huge)" in message(f"{library}:huge")
    assert f"by {library}" in message(f"{library}:tiny", width="wide")


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_missing_library_is_named_with_the_mend(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    text = message(f"{name}:resnet18")
    assert f"needs {name}, which isn't installed" in text
    assert f"pip install {name}" in text


def test_a_library_for_another_torch_is_told_apart(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    text = message("timm:resnet18")
    assert "can't be imported (operator torchvision::nms is missing)" in text


def test_another_prefix_is_no_library():
    assert "'hub:resnet18' is unknown" in message("hub:resnet18")
