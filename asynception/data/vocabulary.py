"""Vocabularies: the name of class i on line i; and from labels as they are written to class ids."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from asynception.data.listing import LabelKind, Listing, Row
from model.errors import InputError

UnknownLabels = Literal["error", "drop"]
_ID_LIMIT = 2**31


@dataclass(frozen=True)
class Vocabulary:
    """Names of classes by id, each once."""

    names: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises InputError for a file with an empty or a repeated line, or none."""
        try:
            text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        names = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
        return cls.checked(names, str(path))

    @classmethod
    def checked(cls, names: Iterable[str], where: str) -> Self:
        """Raises InputError, calling the vocabulary `where`."""
        known: dict[str, int] = {}
        for number, name in enumerate(names):
            if not name.strip() or len(name.splitlines()) > 1:
                raise InputError(
                    f"{where}: line {number + 1} holds {name!r}: a vocabulary has one name a line"
                )
            if name in known:
                raise InputError(
                    f"{where}: lines {known[name] + 1} and {number + 1} both hold {name!r}, so it "
                    "would have two ids: rename or remove one"
                )
            known[name] = number
        return cls(tuple(known))

    def to_text(self) -> bytes:
        return "".join(f"{name}\n" for name in self.names).encode(errors="surrogateescape")


@dataclass(frozen=True)
class ClassIds:
    """What the numbers that `LabelNumbers` gave out mean in the end."""

    ids: Mapping[int, int] | None
    """Number to class id; those that are not here are dropped. None where they are the same."""
    num_classes: int
    vocabulary: Vocabulary | None


class LabelNumbers:
    """Numbers the labels of rows as they come; `class_ids` says what the numbers mean.

    With a vocabulary, or where labels are ids, a label's number is its class id. `num_unknown`
    counts labels that were dropped since they are in no vocabulary, or not below num_classes.
    """

    def __init__(
        self,
        listing: Listing,
        vocabulary: Vocabulary | None,
        num_classes: int | None,
        unknown: UnknownLabels,
    ) -> None:
        self.num_unknown = 0
        self._listing, self._vocabulary, self._unknown = listing, vocabulary, unknown
        self._kind: LabelKind = listing.label_kind
        self._num_classes = num_classes if vocabulary is None else len(vocabulary.names)
        names = listing.class_order or () if vocabulary is None else vocabulary.names
        self._numbers = {name: number for number, name in enumerate(names)}

    def of(self, row: Row) -> list[int]:
        """Sorted, each once. Raises InputError for a label that is unknown or of the wrong kind."""
        numbers = {self._id(row, label) for label in row.labels}
        return sorted(number for number in numbers if number is not None)

    def class_ids(self, counts: Counter[int], min_count: int) -> ClassIds:
        """counts: samples by number. min_count: of a class that the vocabulary is to name.

        Raises InputError for a vocabulary that can't be made.
        """
        if self._kind == "ids" or self._vocabulary is not None:
            num_classes = self._num_classes or max(counts, default=0) + 1
            return ClassIds(None, num_classes, self._vocabulary)
        by_number = list(self._numbers)
        kept = [number for number in range(len(by_number)) if counts[number] >= min_count]
        if self._listing.class_order is None:
            kept.sort(key=lambda number: (-counts[number], by_number[number]))
        if not kept:
            raise InputError(
                f"--min-count={min_count} leaves no class of {self._listing.name}: lower it"
            )
        made = Vocabulary.checked((by_number[number] for number in kept), self._listing.name)
        ids = {number: class_id for class_id, number in enumerate(kept)}
        return ClassIds(ids, len(kept), made)

    def _id(self, row: Row, label: str | int) -> int | None:
        if self._kind == "auto" and isinstance(label, int):
            self._kind = "ids"
        if self._kind == "ids":
            return self._checked_id(row, label)
        if isinstance(label, int):
            raise self._refused(row, label, "a number among names: give names or ids throughout")
        number = self._numbers.get(label)
        if number is not None:
            return number
        if self._kind == "auto" and label.isdecimal():
            raise self._refused(
                row, label, "a number: say with --label-kind whether labels are ids or names"
            )
        if self._vocabulary is not None:
            self._count_unknown(row, label, "which isn't in the vocabulary")
            return None
        return self._numbers.setdefault(label, len(self._numbers))

    def _checked_id(self, row: Row, label: str | int) -> int | None:
        text = str(label)
        if not (text.isascii() and text.isdecimal() and len(text) <= 10) or int(text) >= _ID_LIMIT:
            raise self._refused(
                row, label, "no class id: number classes from 0, or give --label-kind names"
            )
        number = int(text)
        if self._num_classes is not None and number >= self._num_classes:
            self._count_unknown(row, label, f"outside 0..{self._num_classes - 1}")
            return None
        return number

    def _count_unknown(self, row: Row, label: str | int, reason: str) -> None:
        if self._unknown == "error":
            raise self._refused(
                row, label, f"{reason}: add it, or drop such labels with --unknown-labels drop"
            )
        self.num_unknown += 1

    def _refused(self, row: Row, label: str | int, reason: str) -> InputError:
        line = f" (line {row.line})" if row.line else ""
        return InputError(
            f"{self._listing.name}: {row.path}{line} has the label {label!r}, {reason}"
        )
