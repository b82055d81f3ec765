"""The manifest of a set of shards: what there is to know of it without reading a shard.

A JSON file that lies beside its shards, so that both can be moved or copied together.
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


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it was written."""

    name: str
    """Path relative to the manifest's folder, with / between its parts."""
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
            "shard_fields": ["name", "num_samples", "num_bytes", "sha256"],
        }
        head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in rest.items())
        return f'{{\n{head},\n "shards": [\n{shards}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Raises InputError, calling the file `where`, for what isn't a whole manifest."""
        try:
            values = json.loads(text)
            return cls._from_values(values)
        except _Mismatch as error:
            raise _refused(where, str(error)) from None
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise _refused(where, f"{type(error).__name__}: {error}") from None

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> Self:
        if values["format"] != FORMAT:
            raise _Mismatch(f"its format is {values['format']!r}, and this version reads {FORMAT}")
        shards = tuple(_entry(fields) for fields in values["shards"])
        names = None if values["class_names"] is None else tuple(map(str, values["class_names"]))
        counts = np.array(values["label_counts"], np.int64)
        if len({shard.name for shard in shards}) < len(shards):
            raise _Mismatch("it names a shard twice")
        if counts.ndim != 1 or (counts < 0).any() or not shards:
            raise _Mismatch("it needs shards, and counts of labels that are no less than 0")
        if names is not None and len(names) != len(counts):
            raise _Mismatch(f"it has {len(names)} class_names for {len(counts)} label_counts")
        manifest = cls(
            shards, counts, int(values["fewest_labels"]), int(values["most_labels"]), names
        )
        if manifest.num_samples != values["num_samples"]:
            raise _Mismatch(
                f"its shards hold {manifest.num_samples} samples, and num_samples is "
                f"{values['num_samples']}"
            )
        return manifest


class _Mismatch(Exception):
    """Parts of a manifest contradict each other."""


def _entry(fields: Sequence[Any]) -> ShardEntry:
    name, num_samples, num_bytes, sha256 = fields
    if not isinstance(name, str) or name.startswith("/") or ".." in name.split("/"):
        raise _Mismatch(f"the shard {name!r} doesn't lie below the manifest")
    if not (type(num_samples) is type(num_bytes) is int and min(num_samples, num_bytes) >= 0):
        raise _Mismatch(f"the shard {name!r} has no counts of samples and bytes")
    if not _SHA256.fullmatch(sha256):
        raise _Mismatch(f"the shard {name!r} has no sha256")
    return ShardEntry(name, num_samples, num_bytes, sha256)


def _refused(where: str, reason: str) -> InputError:
    return InputError(
        f"{where}: can't be used as a manifest ({reason}): make it anew with "
        "`asynception data index`"
    )
