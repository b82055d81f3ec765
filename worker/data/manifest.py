"""The manifest of a set of shards: what there is to know of it without reading a shard.

A JSON file that lies beside its shards, so that both can be moved or copied together; or away
from them, with their folder's URL in it, where they lie in a bucket that only others write to.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from model.errors import InputError

FORMAT = 1
SUFFIX = ".manifest.json"
"""What a manifest's name ends in: train.manifest.json describes the split `train`."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COUNT_LIMIT = 2**62


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it was written."""

    name: str
    """Path relative to the folder of the shards, with / between its parts."""
    num_samples: int
    num_bytes: int
    """Of the file."""
    sha256: str
    """Of the file, in hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """A set of shards, in order."""

    shards: tuple[ShardEntry, ...]
    label_counts: NDArray[np.int64]
    """(num_classes,): the samples that carry each class."""
    fewest_labels: int
    """Labels of the sample that has fewest."""
    most_labels: int
    """Labels of the sample that has most."""
    class_names: tuple[str, ...] | None = None
    """The name of class i at i."""
    base: str | None = None
    """URL or absolute path of the folder of the shards; without it, the manifest's own."""

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def to_json(self) -> str:
        """The file's text; one line a shard."""
        shards = ",\n".join("  " + json.dumps(list(vars(s).values())) for s in self.shards)
        rest = {
            "format": FORMAT,
            "num_samples": self.num_samples,
            "fewest_labels": self.fewest_labels,
            "most_labels": self.most_labels,
            "label_counts": self.label_counts.tolist(),
            "class_names": self.class_names,
            **({} if self.base is None else {"base": self.base}),
            "shard_fields": ["name", "num_samples", "num_bytes", "sha256"],
        }
        head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in rest.items())
        return f'{{\n{head},\n "shards": [\n{shards}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Raises InputError, calling the file `where`, for what isn't a whole manifest."""
        try:
            return cls._from_values(json.loads(text))
        except _Mismatch as error:
            raise _refused(where, str(error)) from None
        except KeyError as error:
            raise _refused(where, f"it lacks {error}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise _refused(where, f"{type(error).__name__}: {error}") from None

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> Self:
        if values["format"] != FORMAT:
            raise _Mismatch(f"its format is {values['format']!r}, and this version reads {FORMAT}")
        shards = tuple(_entry(fields) for fields in values["shards"])
        if len({shard.name for shard in shards}) < len(shards):
            raise _Mismatch("it names a shard twice")
        manifest = cls(
            shards,
            _counts(values["label_counts"]),
            _count(values["fewest_labels"], "fewest_labels"),
            _count(values["most_labels"], "most_labels"),
            _class_names(values["class_names"]),
            _base(values.get("base")),
        )
        manifest._check_sums(values["num_samples"])
        return manifest

    def _check_sums(self, num_samples: int) -> None:
        """Whether the parts agree, as far as that shows without the shards. Raises _Mismatch."""
        if self.class_names is not None and len(self.class_names) != len(self.label_counts):
            raise _Mismatch(
                f"it has {len(self.class_names)} class_names for {len(self.label_counts)} "
                "label_counts"
            )
        if not self.shards or self.num_samples != num_samples:
            raise _Mismatch(
                f"its {len(self.shards)} shards hold {self.num_samples} samples, and num_samples "
                f"is {num_samples!r}"
            )
        num_labels = sum(self.label_counts.tolist())
        least, most = self.fewest_labels * num_samples, self.most_labels * num_samples
        if self.label_counts.max(initial=0) > num_samples or not least <= num_labels <= most:
            raise _Mismatch(
                f"its label_counts, {num_labels} labels in all, can't be those of {num_samples} "
                f"samples with {self.fewest_labels} to {self.most_labels} labels each"
            )


class _Mismatch(Exception):
    """Parts of a manifest contradict each other, or aren't what they should be."""


def _entry(fields: Sequence[Any]) -> ShardEntry:
    name, num_samples, num_bytes, sha256 = fields
    # Printable, since no file can be named by a NUL or half a character.
    if not isinstance(name, str) or not name.isprintable() or {"", ".", ".."} & {*name.split("/")}:
        raise _Mismatch(f"the shard {name!r} doesn't lie below their folder")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise _Mismatch(f"the shard {name!r} has no sha256")
    _count(num_samples, f"num_samples of the shard {name!r}")
    return ShardEntry(
        name, num_samples, _count(num_bytes, f"num_bytes of the shard {name!r}"), sha256
    )


def _count(value: Any, name: str) -> int:
    # Not isinstance: true and 3.0 are no counts.
    if type(value) is not int or not 0 <= value < _COUNT_LIMIT:
        raise _Mismatch(f"{name} is {_short(value)}, and should be a count from 0")
    return value


def _counts(values: Any) -> NDArray[np.int64]:
    if not isinstance(values, list):
        raise _Mismatch(f"label_counts is {_short(values)}, and should be a list of counts")
    return np.array([_count(value, "one of label_counts") for value in values], np.int64)


def _class_names(values: Any) -> tuple[str, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _Mismatch(f"class_names is {_short(values)}, and should be a list of names")
    return tuple(values)


def _base(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and re.match(r"/|[a-z][a-z0-9+.-]*:[:/]", value)):
        return value
    raise _Mismatch(f"base is {_short(value)}, and should be a URL or an absolute path")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refused(where: str, reason: str) -> InputError:
    return InputError(
        f"{where}: can't be used as a manifest ({reason}): make it anew with "
        "`asynception data index`"
    )
