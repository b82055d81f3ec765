"""Functions in Python files of users' own.

The file's text travels with the settings, so other hosts need not have the file, and a run keeps
what it was trained with. What the file imports must be installed wherever it runs.
"""

import hashlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from model.errors import InputError


@dataclass(frozen=True)
class UserFunction:
    """The function of that name, defined in the file at `path`."""

    path: str
    function: str
    source: str
    """The file's text when it was read."""
    setting: str
    """What messages call it by, like data.train."""

    def __str__(self) -> str:
        return f"{self.setting} {self.path}:{self.function}"

    def load(self) -> Callable[..., Any]:
        """The function. Raises InputError if the file fails, or doesn't define it."""
        function = getattr(self._module(), self.function, None)
        if not callable(function):
            raise InputError(
                f"{self}: the file defines no function {self.function!r}: name one that it does"
            )
        return function  # type: ignore[no-any-return]

    def run(self, call: Callable[[], Any], what: str = "") -> Any:
        """What `call` returns. It runs the user's own code, which may raise anything.

        Raises InputError with the line that failed; `what` says what was under way.
        """
        try:
            return call()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame.lineno for frame in frames if frame.filename == self.path]
            line = f" at line {own[-1]}" if own else ""
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{self}{what} failed{line}: {text}") from error

    def _module(self) -> ModuleType:
        """The file as a module, run once in each process."""
        digest = hashlib.sha256(f"{self.path}\0{self.source}".encode()).hexdigest()[:16]
        name = f"asynception_user_{digest}"
        if name not in sys.modules:
            module = ModuleType(name)
            module.__file__ = self.path
            # Before it runs: dataclasses and others look their own module up.
            sys.modules[name] = module
            try:
                self.run(lambda: exec(compile(self.source, self.path, "exec"), vars(module)))
            except InputError:
                del sys.modules[name]
                raise
        return sys.modules[name]


def read_user_function(value: str, setting: str) -> UserFunction:
    """The function that a setting names by path/to/file.py:function. Raises InputError."""
    path, colon, function = value.rpartition(":")
    if not colon or not path or not function.isidentifier():
        raise InputError(f"{setting} = {value!r} names no function: write path/to/file.py:function")
    try:
        source = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{setting} = {value!r} can't be read: {error}: name a Python file"
        ) from None
    return UserFunction(path, function, source, setting)
