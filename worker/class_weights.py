"""Text files that say something of classes: a weight for each, or which ones count.

Both kinds are UTF-8, one class a line; blank lines and what follows a `#` are skipped.

- Weights: `class,weight`, in any order, like `17,0.25`. A weight is a decimal number, not
  negative, that float32 can hold.
- Subset: `class`, in any order, like `17`.

Every InputError names the setting, the file and, where there is one, the line.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.errors import InputError

_LARGEST_WEIGHT = torch.finfo(torch.float32).max
_SHOWN_CHARACTERS = 40


def read_class_weights(
    path: str, num_classes: int, *, setting: str, complete: bool = False
) -> Tensor:
    """float32 (num_classes,): the weight of each class, 0 for one without a line.

    complete: refuse a file in which a class has no line.
    Raises InputError.
    """
    where = f"{setting}={path!r}"
    weights: dict[int, float] = {}
    for line in _lines(path, where):
        name, comma, weight = line.text.partition(",")
        if not comma:
            raise line.error("is not of the form class,weight: write one like 17,0.25")
        class_id = _class_id(name, line, num_classes)
        if class_id in weights:
            raise line.error(f"gives class {class_id} a second weight: leave one")
        weights[class_id] = _weight(weight, line)
    missing = next((i for i in range(num_classes) if i not in weights), None)
    if complete and missing is not None:
        raise InputError(
            f"{where} has no line for class {missing}: give each of the {num_classes} classes a "
            "weight (0 leaves a class out)"
        )
    tensor = torch.zeros(num_classes)
    tensor[list(weights)] = torch.tensor(list(weights.values()))
    if not tensor.any():
        raise InputError(f"{where} weighs every class 0, so nothing would count: raise a weight")
    return tensor


def read_classes(path: str, num_classes: int, *, setting: str) -> Tensor:
    """int64, rising: the ids of the classes in the file, at least one. Raises InputError."""
    seen: set[int] = set()
    for line in _lines(path, f"{setting}={path!r}"):
        class_id = _class_id(line.text, line, num_classes)
        if class_id in seen:
            raise line.error(f"names class {class_id} a second time: leave it once")
        seen.add(class_id)
    return torch.tensor(sorted(seen))


class _Line(NamedTuple):
    where: str
    number: int
    text: str

    def error(self, problem: str) -> InputError:
        """`problem`: what is wrong with the line, and how to mend it."""
        text = self.text
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
        return InputError(f"{self.where}, line {self.number}: {shown!r} {problem}")


def _lines(path: str, where: str) -> Iterator[_Line]:
    """The lines that hold something, at least one, numbered from 1 as editors do."""
    try:
        text = Path(path).read_text("utf-8-sig")  # spreadsheets start files with a mark
    except OSError as error:
        raise InputError(f"{where} can't be read ({error.strerror}): name a text file") from None
    except ValueError:  # bytes that aren't UTF-8, a path with a null character
        raise InputError(f"{where} is not UTF-8 text: name a text file") from None
    stripped = (line.partition("#")[0].strip() for line in text.split("\n"))
    lines = [_Line(where, number, line) for number, line in enumerate(stripped, 1) if line]
    if not lines:
        raise InputError(f"{where} is empty: give it a line for each class that counts")
    yield from lines


def _class_id(text: str, line: _Line, num_classes: int) -> int:
    try:
        class_id = int(text)
    except ValueError:
        raise line.error(f"names no class: start with an id, 0 to {num_classes - 1}") from None
    if not 0 <= class_id < num_classes:
        raise line.error(f"is about no class of the model: ids go from 0 to {num_classes - 1}")
    return class_id


def _weight(text: str, line: _Line) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise line.error("ends in no number: write one weight, like 17,0.25") from None
    if math.isfinite(weight) and 0 <= weight <= _LARGEST_WEIGHT:
        return weight
    raise line.error(
        "has a weight that is negative, not finite or too large: choose one from 0 to "
        f"{_LARGEST_WEIGHT:.1e}"
    )
