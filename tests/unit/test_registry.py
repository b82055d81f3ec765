"""Models by name, and one line for whatever a user gets wrong."""

from typing import Any

import pytest
import torch

from model.errors import InputError
from model.registry import check_settings, create_model, model_names, model_setting_names
from model.xception import Xception, XceptionSettings


def message(name: str, num_classes: int, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        create_model(name, num_classes, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def test_every_name_gives_a_model_with_its_classes() -> None:
    assert model_names() == (
        "inception_v3",
        "inception_v3_2016",
        "resnet152",
        "vgg16",
        "xception",
    )
    for name in model_names():
        with torch.device("meta"):
            model = create_model(name, 7)
        assert model(torch.empty(2, 3, 96, 96, device="meta")).shape == (2, 7)


def test_settings_reach_the_model() -> None:
    given = {"width": 0.05, "middle_blocks": 1, "dropout": 0.5}
    torch.manual_seed(0)
    expected = Xception(XceptionSettings(**given), 3).state_dict()
    torch.manual_seed(0)
    model = create_model("xception", 3, **given)
    assert isinstance(model, Xception)
    assert model.head.dropout == 0.5
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_values_from_a_command_line_are_parsed() -> None:
    with torch.device("meta"):
        model = create_model("xception", 3, width="0.05", middle_blocks="2")
    assert isinstance(model, Xception)
    assert model.num_blocks == 8


@pytest.mark.parametrize("typed", ["xeption", "Xception", "exception", "xception71"])
def test_an_unknown_name_is_answered_with_the_nearest(typed: str) -> None:
    text = message(typed, 3)
    assert repr(typed) in text
    assert "did you mean 'xception'?" in text


def test_a_name_like_none_is_answered_with_the_list() -> None:
    text = message("alexnet", 3)
    assert "did you mean" not in text
    assert text.endswith("xception, timm:NAME, torchvision:NAME")


def test_an_unknown_setting_is_answered_with_the_nearest() -> None:
    text = message("xception", 3, widht=0.5)
    assert "'widht'" in text
    assert "did you mean 'width'?" in text
    assert ": choose among " in text
    assert set(text.partition(": choose among ")[2].split(", ")) == set(
        XceptionSettings.model_fields
    )


@pytest.mark.parametrize(
    ("setting", "value", "shown"),
    [
        ("width", 0, "width = 0 "),
        ("width", "wide", "width = 'wide' "),
        ("width", float("nan"), "width = nan "),
        ("width", torch.zeros(2, 2), "width = tensor([[0., 0.], [0., 0.]]) "),
        ("middle_blocks", -1, "middle_blocks = -1 "),
        ("middle_blocks", 1.5, "middle_blocks = 1.5 "),
        ("dropout", 1, "dropout = 1 "),
        ("dropout", None, "dropout = None "),
    ],
)
def test_a_bad_setting_is_named_with_its_value(setting: str, value: Any, shown: str) -> None:
    assert shown in message("xception", 3, **{setting: value})


def test_the_first_of_several_bad_settings_is_enough() -> None:
    text = message("xception", 3, width=-1, dropout=2)
    assert ("width = -1 " in text) != ("dropout = 2 " in text)


def test_settings_can_be_checked_without_a_model() -> None:
    checked = check_settings("xception", {"width": "0.5", "middle_blocks": 3})
    assert checked == XceptionSettings(width=0.5, middle_blocks=3)
    with pytest.raises(InputError, match="width = -1 "):
        check_settings("xception", {"width": -1})
    with pytest.raises(InputError, match="did you mean 'xception'"):
        check_settings("xeption", {})


def test_setting_names_are_those_of_all_models() -> None:
    names = model_setting_names()
    assert len(names) == len(set(names))
    assert set(names) >= set(XceptionSettings.model_fields)


def test_no_classes_are_refused() -> None:
    assert "num_classes = 0 " in message("xception", 0)
