"""A user's own model: a function in a Python file that returns any `nn.Module`."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.errors import InputError
from model.flat import Segment, parameter_segments, statistic_segments
from model.user_code import UserFunction, read_user_function


@dataclass(frozen=True)
class Factory(UserFunction):
    """`function(num_classes, **settings) -> nn.Module`."""

    setting: str = "model.factory"

    def build(self, num_classes: int, settings: Mapping[str, Any]) -> nn.Module:
        """A new module, which should map (N, 3, H, W) images to (N, num_classes) logits.

        Raises InputError if the file or the function fails, doesn't take these settings, or
        returns something else.
        """
        function = self.load()
        try:
            inspect.signature(function).bind(num_classes, **settings)
        except TypeError as error:
            raise InputError(
                f"{self} is called with num_classes and the other settings of"
                f" [model], here {dict(settings)}, but doesn't take them: {error}"
            ) from None
        module = self.run(lambda: function(num_classes, **settings))
        if not isinstance(module, nn.Module):
            raise InputError(
                f"{self} returned a {type(module).__name__} where an nn.Module is"
                " needed: return the module itself"
            )
        return module

    def build_twice(self, num_classes: int, settings: Mapping[str, Any]) -> nn.Module:
        """`build`, and a second time to compare.

        Every process builds its own copy, and what they exchange is laid out by names and shapes.
        Raises InputError, also if two calls give different parameters or buffers.
        """
        module = self.build(num_classes, settings)
        first, second = _segments(module), _segments(self.build(num_classes, settings))
        if first == second:
            return module
        name = next(s.name for s in (*first, *second) if s not in first or s not in second)
        raise InputError(
            f"{self} gives other parameters at its second call (the first that"
            f" differs is {name!r}), so processes could not exchange them: let names and shapes"
            " depend on the settings alone"
        )


def read_factory(setting: str) -> Factory:
    """The factory that `path/to/file.py:function` names. Raises InputError."""
    read = read_user_function(setting, "model.factory")
    return Factory(read.path, read.function, read.source)


def _segments(module: nn.Module) -> tuple[Segment, ...]:
    return parameter_segments(module) + statistic_segments(module)
