from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from worker.data.labels import LabelLists


@given(st.lists(st.lists(st.integers(0, 6))))
def test_lists_survive_and_know_their_rows(lists: list[list[int]]) -> None:
    labels = LabelLists.from_lists(lists)
    assert labels.ids.dtype == labels.offsets.dtype == torch.int64
    assert labels.num_images == len(lists)
    assert labels.counts().tolist() == [len(row) for row in lists]
    ends = labels.offsets.tolist()
    assert [labels.ids[a:b].tolist() for a, b in pairwise(ends)] == lists
    assert labels.rows().tolist() == [i for i, row in enumerate(lists) for _ in row]
