"""Models of torchvision and timm by name, where those are installed."""

import importlib
from types import ModuleType
from typing import Any

from torch import nn

from model.errors import InputError

LIBRARIES = ("timm", "torchvision")


def is_zoo_name(name: str) -> bool:
    """Whether a model's name is `timm:NAME` or `torchvision:NAME`."""
    return name.partition(":")[0] in LIBRARIES and ":" in name


def create_zoo_model(name: str, num_classes: int, **settings: Any) -> nn.Module:
    """`timm:NAME` or `torchvision:NAME` with `num_classes` outputs; settings are the library's.

    Raises InputError where the library is missing, or refuses the name or a setting.
    """
    library, _, model = name.partition(":")
    module = _import(library, name)
    create = module.create_model if library == "timm" else module.models.get_model
    try:
        built = create(model, num_classes=num_classes, **settings)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"model {name!r} can't be built by {library}: {error}") from None
    assert isinstance(built, nn.Module), type(built)
    return built


def _import(library: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError:
        mend = f"pip install {library}, on every node, or choose one of `asynception models`"
        raise InputError(f"model {name!r} needs {library}, which isn't installed: {mend}") from None
    except (ImportError, RuntimeError, OSError) as error:
        # torchvision raises RuntimeError when it was built for another torch.
        raise InputError(
            f"model {name!r} needs {library}, which is installed but can't be imported"
            f" ({error}): install the {library} that belongs to this torch"
        ) from None
