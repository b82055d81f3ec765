"""A user's own data set: a function in a Python file that returns any map-style `Dataset`.

The function takes no argument, or `split`, which is then "train" or "val". What it returns has
`len(ds)` and `ds[i] -> (image, label)`; see `UserDatasetSource`. As with a model of one's own, the
file's text travels with the settings. What the file imports and the images it reads must be there
wherever it runs; it had better name them by absolute paths, since a run is resumed from a copy.
"""

import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.errors import InputError
from model.user_code import UserFunction
from worker.data.source import Sample

_SETTING = re.compile(r"\.py(:[^/\\]*)?$")
_ID_LIMIT = 2**31
_NUM_COMPARED = 8
"""Samples that are read again to see whether labels are what they are said to be."""

_log = logging.getLogger(__name__)


def is_user_dataset(path: str) -> bool:
    """Whether a path names a function in a Python file, or at least the file."""
    return _SETTING.search(path) is not None


class _Dataset(Protocol):
    """As `torch.utils.data.Dataset`, with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class UserDatasetSource:
    """The samples of the `Dataset` that a user's function returns, as a single shard.

    An image is a PIL image, uint8 (H, W, 3) or (H, W) as an array, uint8 (3, H, W) as a tensor, or
    the bytes of an encoded file: of those, damaged ones are skipped and counted as in any source,
    whereas what `ds[i]` raises ends the run. A label is a class id, or a list of them.

    The function is called in every process, so it must return the same samples in the same order.
    One sample is read at a time, unless the data set has an attribute `thread_safe` that is True.

    split: given to the function if it takes a `split`.
    Pickles as the file's text. Raises InputError, naming file, sample and reason.
    """

    def __init__(self, function: UserFunction, split: str) -> None:
        self._function, self._split = function, split
        self._dataset = self._make()
        self._num_samples = self._length(self._dataset)
        if not self._num_samples:
            raise InputError(f"{function} returned an empty Dataset: let it find its samples")
        thread_safe = getattr(self._dataset, "thread_safe", False) is True
        self._one_at_a_time = nullcontext() if thread_safe else threading.Lock()
        self._table: _LabelTable | None = None
        self._making_table = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return UserDatasetSource, (self._function, self._split)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return (self._num_samples,)

    @property
    def class_names(self) -> None:
        return None

    @property
    def cached_shards(self) -> None:
        return None

    @property
    def known_labels(self) -> None:
        return None

    @property
    def fetches(self) -> bool:
        return False

    def announce(self, shards: Sequence[int]) -> None:
        pass

    def labels(self, shard: int, index: int) -> tuple[int, ...]:
        """The sample's labels; the first call collects those of all samples.

        From the data set's `targets` or `labels` if they are its labels, as in torchvision's, and
        else by reading every sample. Then also the function is called again to compare.
        """
        assert shard == 0
        with self._making_table:
            if self._table is None:
                self._table = self._make_table()
        return self._table.labels(index)

    def read(self, shard: int, index: int) -> Sample:
        assert shard == 0
        with self._one_at_a_time:
            image, labels = self._read(self._dataset, index)
            if isinstance(image, Image.Image):  # which may be opened, but not read yet
                self._function.run(image.load, f": the image of sample {index}")
            try:
                key = f"{Path(self._function.path).name}[{index}]"
                return Sample(key, _bytes_or_rgb(image), labels)
            except _Unusable as error:
                raise self._unusable(index, error) from None

    def _read(self, dataset: _Dataset, index: int) -> tuple[Any, tuple[int, ...]]:
        """The image as it is returned, and the labels."""
        sample = self._function.run(lambda: dataset[index], f": sample {index}")
        try:
            if not isinstance(sample, tuple | list) or len(sample) != 2:
                raise _Unusable(f"is {_kind(sample)} where (image, label) is needed")
            return sample[0], _label_ids(sample[1])
        except _Unusable as error:
            raise self._unusable(index, error) from None

    def _unusable(self, index: int, reason: Exception) -> InputError:
        return InputError(f"{self._function}: sample {index} {reason}")

    def _make(self) -> _Dataset:
        """A new data set, of what the function returns now."""
        function = self._function.load()
        arguments = self._arguments(function)
        dataset: _Dataset = self._function.run(lambda: function(**arguments))
        lacking = [n for n in ("__len__", "__getitem__") if not hasattr(type(dataset), n)]
        if lacking:
            raise InputError(
                f"{self._function} returned a {type(dataset).__name__} without {lacking[0]}: "
                "return a map-style Dataset, which has a length and is read by index"
            )
        return dataset

    def _arguments(self, function: Callable[..., Any]) -> dict[str, str]:
        signature = self._function.run(lambda: inspect.signature(function))
        for arguments in ({"split": self._split}, {}):
            try:
                signature.bind(**arguments)
            except TypeError as error:
                refusal = error
            else:
                return arguments
        raise InputError(
            f"{self._function} is called with split={self._split!r} or with nothing, but doesn't "
            f"take that: {refusal}: give its other arguments defaults"
        )

    def _length(self, dataset: _Dataset) -> int:
        return int(self._function.run(lambda: len(dataset), ": its length"))

    def _make_table(self) -> "_LabelTable":
        with self._one_at_a_time:
            dataset = self._dataset
            table = self._declared(dataset) or self._scanned(dataset)
            self._check_steady(dataset, table)
        again = self._make()
        self._check_steady(again, table)
        return table

    def _declared(self, dataset: _Dataset) -> "_LabelTable | None":
        """The labels in the data set's own list, unless samples have others."""
        for name in ("targets", "labels"):
            listed = getattr(dataset, name, None)
            if not isinstance(listed, Sequence | np.ndarray | Tensor):
                continue
            if len(listed) != self._num_samples:
                continue
            try:
                table = _LabelTable.of(map(_label_ids, _listed(listed)))
            except _Unusable:
                continue
            if self._differing(dataset, table) is None:
                return table
        return None

    def _scanned(self, dataset: _Dataset) -> "_LabelTable":
        _log.warning(
            "%s: the Dataset has no list `targets` of its labels, so all %d samples are read for"
            " them before the start",
            self._function,
            self._num_samples,
        )
        samples = (self._read(dataset, index) for index in range(self._num_samples))
        return _LabelTable.of(labels for _, labels in samples)

    def _check_steady(self, dataset: _Dataset, table: "_LabelTable") -> None:
        """Every process calls the function for itself, and positions must mean the same in all."""
        num_samples = self._length(dataset)
        if num_samples != self._num_samples:
            raise InputError(
                f"{self._function} has {num_samples} samples at a later call and had "
                f"{self._num_samples} at first, so processes would not agree on what to read: "
                "let it return the same samples every time"
            )
        index = self._differing(dataset, table)
        if index is not None:
            raise InputError(
                f"{self._function} gives sample {index} other labels at a later call, so processes "
                "would not agree on what to read: let it return the same samples in the same "
                "order every time, with a fixed seed where it draws"
            )

    def _differing(self, dataset: _Dataset, table: "_LabelTable") -> int | None:
        """The first of some samples whose labels aren't those of the table."""
        last = self._num_samples - 1
        for index in dict.fromkeys(last * k // _NUM_COMPARED for k in range(_NUM_COMPARED + 1)):
            if set(self._read(dataset, index)[1]) != set(table.labels(index)):
                return index
        return None


@dataclass(frozen=True)
class _LabelTable:
    """Labels of sample i: `ids[offsets[i]:offsets[i + 1]]`, both int64."""

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, labels: Iterable[tuple[int, ...]]) -> Self:
        rows = list(labels)
        offsets = list(accumulate(map(len, rows), initial=0))
        ids = list(chain.from_iterable(rows))
        return cls(np.array(ids, np.int64), np.array(offsets, np.int64))

    def labels(self, index: int) -> tuple[int, ...]:
        first, end = self.offsets[index : index + 2]
        return tuple(self.ids[first:end].tolist())


class _Unusable(Exception):
    """What a sample is, or has, and what is needed instead."""


def _listed(values: Any) -> list[Any]:
    """Anything that counts as a sequence as a list, of Python's numbers where it had others."""
    return list(values.tolist() if isinstance(values, np.ndarray | Tensor) else values)


def _label_ids(label: Any) -> tuple[int, ...]:
    """Class ids, each once."""
    if isinstance(label, np.ndarray | np.generic | Tensor):
        label = label.tolist()
    ids = [_label_id(each) for each in (label if isinstance(label, list | tuple) else [label])]
    if len(ids) > 2 and len(set(ids)) < len(ids) and set(ids) <= {0, 1}:
        raise _Unusable(
            f"has {len(ids)} zeros and ones as labels, which would be taken for ids: return the "
            "ids of its classes"
        )
    return tuple(dict.fromkeys(ids))


def _label_id(label: Any) -> int:
    if isinstance(label, np.generic | Tensor):
        label = label.tolist()
    if type(label) is not int or not 0 <= label < _ID_LIMIT:
        raise _Unusable(
            f"has the label {repr(label)[:40]}, which is no class id: return an integer from 0, "
            "or a list of them"
        )
    return label


def _bytes_or_rgb(image: Any) -> bytes | NDArray[np.uint8]:
    """An image as `Sample.image` holds it."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, Image.Image):
        return _rgb(image)
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or str(image.dtype) != "torch.uint8":
            raise _unusable_image(image)
        image = image.permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or 0 in image.shape:
        raise _unusable_image(image)
    if image.ndim == 2:
        return np.repeat(image[:, :, np.newaxis], 3, axis=2)
    if image.ndim == 3 and image.shape[2] == 3:
        return np.ascontiguousarray(image)
    raise _unusable_image(image)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any mode of 8 bits to RGB; what is transparent shows white."""
    if image.mode[0] in "IF":
        raise _Unusable(
            f"has an image of mode {image.mode}, whose values have no defined range: return "
            'image.convert("RGB") after scaling them to 0..255'
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def _unusable_image(image: Any) -> _Unusable:
    return _Unusable(
        f"has {_kind(image)} for an image: return a PIL image, uint8 (H, W, 3) or (H, W), a uint8 "
        "tensor (3, H, W), or encoded bytes, without ToTensor or Normalize, which follow later"
    )


def _kind(value: Any) -> str:
    """A type, and where it says more the dtype and the shape."""
    name = type(value).__name__
    if isinstance(value, np.ndarray | Tensor):
        return f"{name} {value.dtype} {tuple(value.shape)}"
    return f"{name} of length {len(value)}" if isinstance(value, tuple | list) else name
