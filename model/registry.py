"""Models by name."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError
from torch import nn

from model.errors import InputError
from model.inception_v3 import (
    InceptionV3,
    InceptionV3Of2016,
    InceptionV3Of2016Settings,
    InceptionV3Settings,
)
from model.resnet import ResNet152, ResNet152Settings
from model.settings import Settings
from model.vgg import VGG16, VGG16Settings
from model.xception import Xception, XceptionSettings
from model.zoo import LIBRARIES, create_zoo_model, is_zoo_name


class _Entry(NamedTuple):
    settings: type[Settings]
    build: Callable[[Any, int], nn.Module]
    input_size: int
    """Side of the images that the model was designed for, in pixels."""


_MODELS = {
    "xception": _Entry(XceptionSettings, Xception, input_size=299),
    "inception_v3": _Entry(InceptionV3Settings, InceptionV3, input_size=299),
    "inception_v3_2016": _Entry(InceptionV3Of2016Settings, InceptionV3Of2016, input_size=299),
    "vgg16": _Entry(VGG16Settings, VGG16, input_size=224),
    "resnet152": _Entry(ResNet152Settings, ResNet152, input_size=224),
}


def model_names() -> tuple[str, ...]:
    """The names that `create_model` knows, sorted."""
    return tuple(sorted(_MODELS))


def input_size(name: str) -> int:
    """Side of the images that a registered model was designed for, in pixels."""
    return _MODELS[name].input_size


def create_model(name: str, num_classes: int, **settings: Any) -> nn.Module:
    """A new, initialised model that maps images to (N, num_classes) logits.

    `settings` are the fields of the model's settings class. Build it under
    `torch.device("meta")` to learn its shapes without allocating memory. `timm:NAME` and
    `torchvision:NAME` are those libraries' models, with their settings.

    Raises InputError for an unknown name, an unknown or bad setting, or `num_classes` below 1.
    """
    if is_zoo_name(name):
        return create_zoo_model(name, num_classes, **settings)
    validated = check_settings(name, settings)
    return _MODELS[name].build(validated, num_classes)


def check_settings(name: str, settings: Mapping[str, Any]) -> Settings:
    """A model's settings, validated. Raises InputError for an unknown name or setting."""
    if name not in _MODELS:
        known = ", ".join((*model_names(), *(f"{library}:NAME" for library in LIBRARIES)))
        raise InputError(f"model {name!r} is unknown{_hint(name, _MODELS)}: choose one of {known}")
    entry = _MODELS[name]
    try:
        return entry.settings(**settings)
    except ValidationError as error:
        raise InputError(_describe(name, entry.settings, error)) from None


def model_setting_names() -> tuple[str, ...]:
    """The settings that some model has, each once."""
    names = (name for entry in _MODELS.values() for name in entry.settings.model_fields)
    return tuple(dict.fromkeys(names))


def _describe(model: str, settings: type[Settings], error: ValidationError) -> str:
    """One line about the first of pydantic's complaints."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(settings.model_fields)
        return (
            f"setting {field!r} is unknown to model {model!r}{_hint(field, settings.model_fields)}:"
            f" choose among {known}"
        )
    complaint = first["msg"][0].lower() + first["msg"][1:]
    value = " ".join(repr(first["input"]).split())
    return f"setting {field} = {value} of model {model!r} cannot be used: {complaint}"


def _hint(name: str, known: Iterable[str]) -> str:
    """The nearest known name, whatever the case it was typed in, or nothing."""
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
