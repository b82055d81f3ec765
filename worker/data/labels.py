"""The labels of a batch: a ragged list of class ids per image."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelLists:
    """Image i carries the classes `ids[offsets[i]:offsets[i + 1]]`.

    The lists are kept as given. Where they stand for sets, as in the multilabel objective and
    MAP@k, a class named twice for one image counts once.
    ids: int64 (total,). offsets: int64 (N + 1,), from 0 to total.
    """

    ids: Tensor
    offsets: Tensor

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int]]) -> Self:
        rows = list(lists)
        offsets = list(accumulate(map(len, rows), initial=0))
        ids = list(chain.from_iterable(rows))
        return cls(torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64))

    @property
    def num_images(self) -> int:
        return self.offsets.numel() - 1

    def counts(self) -> Tensor:
        """Labels of each image, int64 (N,)."""
        return self.offsets.diff()

    def rows(self) -> Tensor:
        """The image of each of `ids`, int64 (total,)."""
        return torch.repeat_interleave(self.counts(), output_size=self.ids.numel())
