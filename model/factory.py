"""A user's own model: a function in a Python file that returns any `nn.Module`.

The file's text travels with the settings, so other hosts need not have the file, and a run keeps
what it was trained with. What the file imports must be installed wherever it runs.
"""

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from model.errors import InputError
from model.flat import Segment, parameter_segments, statistic_segments


@dataclass(frozen=True)
class Factory:
    """`function(num_classes, **settings) -> nn.Module`, defined in the file at `path`."""

    path: str
    function: str
    source: str
    """The file's text when it was read."""

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"

    def build(self, num_classes: int, settings: Mapping[str, Any]) -> nn.Module:
        """A new module, which should map (N, 3, H, W) images to (N, num_classes) logits.

        Raises InputError if the file or the function fails, doesn't take these settings, or
        returns something else.
        """
        function = self._function()
        try:
            inspect.signature(function).bind(num_classes, **settings)
        except TypeError as error:
            raise InputError(
                f"model.factory {self} is called with num_classes and the other settings of"
                f" [model], here {dict(settings)}, but doesn't take them: {error}"
            ) from None
        module = self._run(lambda: function(num_classes, **settings))
        if not isinstance(module, nn.Module):
            raise InputError(
                f"model.factory {self} returned a {type(module).__name__} where an nn.Module is"
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
            f"model.factory {self} gives other parameters at its second call (the first that"
            f" differs is {name!r}), so processes could not exchange them: let names and shapes"
            " depend on the settings alone"
        )

    def _function(self) -> Callable[..., Any]:
        function = getattr(self._module(), self.function, None)
        if not callable(function):
            raise InputError(
                f"model.factory {self}: the file defines no function {self.function!r}: name one"
                " that it does"
            )
        return function  # type: ignore[no-any-return]

    def _module(self) -> ModuleType:
        """The file as a module, run once in each process."""
        digest = hashlib.sha256(f"{self.path}\0{self.source}".encode()).hexdigest()[:16]
        name = f"asynception_factory_{digest}"
        if name not in sys.modules:
            module = ModuleType(name)
            module.__file__ = self.path
            # Before it runs: dataclasses and others look their own module up.
            sys.modules[name] = module
            try:
                self._run(lambda: exec(compile(self.source, self.path, "exec"), vars(module)))
            except InputError:
                del sys.modules[name]
                raise
        return sys.modules[name]

    def _run(self, call: Callable[[], Any]) -> Any:
        """What the user's own code may raise is anything."""
        try:
            return call()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame.lineno for frame in frames if frame.filename == self.path]
            line = f" at line {own[-1]}" if own else ""
            raise InputError(
                f"model.factory {self} failed{line}: {type(error).__name__}: {error}"
            ) from error


def read_factory(setting: str) -> Factory:
    """The factory that `path/to/file.py:function` names. Raises InputError."""
    path, colon, function = setting.rpartition(":")
    if not colon or not path or not function.isidentifier():
        raise InputError(
            f"model.factory = {setting!r} names no function: write path/to/file.py:function"
        )
    try:
        source = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"model.factory = {setting!r} can't be read: {error}: name a Python file"
        ) from None
    return Factory(path, function, source)


def _segments(module: nn.Module) -> tuple[Segment, ...]:
    return parameter_segments(module) + statistic_segments(module)
