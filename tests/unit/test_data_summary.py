from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from worker.data.source import KnownLabels, Sample
from worker.data.summary import summarize


class ListedSource:
    cached_shards = None
    known_labels: KnownLabels | None = None
    fetches = False

    def __init__(
        self, shards: list[list[tuple[int, ...]]], class_names: tuple[str, ...] | None = None
    ) -> None:
        self._shards = shards
        self.class_names = class_names

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self._shards))

    def announce(self, shards: Sequence[int]) -> None:
        pass

    def labels(self, shard: int, index: int) -> tuple[int, ...]:
        return self._shards[shard][index]

    def read(self, shard: int, index: int) -> Sample:
        return Sample(f"key-{shard}-{index}", b"", self._shards[shard][index])


label_sets = st.sets(st.integers(0, 9)).map(tuple)


@given(st.lists(st.lists(label_sets), min_size=1), st.one_of(st.none(), st.integers(10, 12)))
def test_counts_are_those_of_a_plain_count(
    shards: list[list[tuple[int, ...]]], num_classes: int | None
) -> None:
    summary = summarize(ListedSource(shards), num_classes)
    labels = [label for shard in shards for sample in shard for label in sample]
    assert summary.num_samples == sum(map(len, shards))
    assert summary.shard_sizes == tuple(map(len, shards))
    assert summary.num_classes == (num_classes or max(labels, default=-1) + 1)
    counts = Counter(labels)
    assert summary.label_counts.tolist() == [counts[i] for i in range(summary.num_classes)]


def test_class_names_count_as_classes() -> None:
    names = ("ant", "bee", "cat")
    assert summarize(ListedSource([[(0,)]], names), None).label_counts.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("label", "num_classes", "message"),
    [
        (-1, None, "'key-1-1' has the label -1"),
        (-1, 5, "'key-1-1' has the label -1"),
        (5, 5, r"'key-1-1' has the label 5, but data.num_classes=5 allows 0 to 4"),
    ],
)
def test_labels_outside_are_refused(label: int, num_classes: int | None, message: str) -> None:
    source = ListedSource([[(0,)], [(1,), (2, label), (label,)]])
    with pytest.raises(InputError, match=message):
        summarize(source, num_classes)


class Counted(ListedSource):
    """As a manifest describes it: nothing can be asked of a sample."""

    known_labels = KnownLabels(np.array([2, 0, 1]), 1, 2)

    def labels(self, shard: int, index: int) -> tuple[int, ...]:
        raise AssertionError("a sample was asked for")


@pytest.mark.parametrize(("num_classes", "counts"), [(None, [2, 0, 1]), (5, [2, 0, 1, 0, 0])])
def test_counts_that_are_known_need_no_sample(num_classes: int | None, counts: list[int]) -> None:
    summary = summarize(Counted([[(0, 2)], [(0,)]]), num_classes)
    assert summary.label_counts.tolist() == counts
    assert (summary.num_samples, summary.num_classes) == (2, len(counts))


def test_known_counts_outside_are_refused() -> None:
    with pytest.raises(InputError, match=r"the label 2, but data\.num_classes=2 allows 0 to 1"):
        summarize(Counted([[(0, 2)], [(0,)]]), 2)
