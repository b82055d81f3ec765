"""The layout: balance, exactness of the decayed ranges, and the same answer everywhere."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from model.flat import ALIGNMENT, Segment, flat_numel, parameter_segments, statistic_segments
from model.registry import create_model
from ps.layout import Layout, Range, plan_layout

ROOT = Path(__file__).parents[2]

# Read in another process, under another hash seed, to show that a layout follows from shapes alone.
DESCRIBE_XCEPTION = """
import torch
from model.flat import parameter_segments, statistic_segments
from model.registry import create_model
from ps.layout import plan_layout
with torch.device("meta"):
    model = create_model("xception", 17_000)
for shards in (1, 7, 64):
    print(plan_layout(parameter_segments(model), statistic_segments(model), shards))
"""


def lay_out(tensors):
    """Segments for (elements, decayed) pairs, each starting at the next multiple of ALIGNMENT."""
    segments, offset = [], 0
    for index, (numel, decayed) in enumerate(tensors):
        segments.append(Segment(f"t{index}", (numel,), offset, decayed))
        offset += -(-numel // ALIGNMENT) * ALIGNMENT
    return tuple(segments)


tensor_lists = st.lists(st.tuples(st.integers(1, 150), st.booleans()), min_size=1, max_size=10)
segments_of = tensor_lists.map(lay_out)
statistics_of = st.lists(st.tuples(st.integers(1, 150), st.just(False)), max_size=6).map(lay_out)


@st.composite
def plans(draw):
    parameters, statistics = draw(segments_of), draw(statistics_of)
    num_shards = draw(st.integers(1, flat_numel(parameters) // ALIGNMENT))
    return parameters, statistics, num_shards


def spread(numels):
    return max(numels) - min(numels)


def assert_balanced(layout: Layout):
    for numels in (
        [shard.parameters.numel for shard in layout.shards],
        [shard.statistics.numel for shard in layout.shards],
        [shard.numel for shard in layout.shards],
    ):
        assert spread(numels) <= ALIGNMENT


def assert_covers(ranges: list[Range], numel: int):
    """Every element of 0..numel lies in exactly one range, in order, cut at whole quanta."""
    borders = [0]
    for span in ranges:
        assert span.start == borders[-1]
        assert span.start % ALIGNMENT == 0
        assert span.numel >= 0
        borders.append(span.stop)
    assert borders[-1] == numel


def brute_force_mask(segments):
    mask = np.zeros(flat_numel(segments), bool)
    for segment in segments:
        for element in range(segment.offset, segment.stop):
            mask[element] = segment.decayed
    return mask


def mask_of(shard):
    mask = np.zeros(shard.parameters.numel, bool)
    for span in shard.decayed:
        assert not mask[span.slice()].any(), "decayed ranges overlap"
        mask[span.slice()] = True
    return mask


@given(plans())
@settings(deadline=None)
def test_shards_are_balanced_and_cover_each_vector_once(plan):
    parameters, statistics, num_shards = plan
    layout = plan_layout(parameters, statistics, num_shards)
    assert len(layout.shards) == num_shards
    assert_balanced(layout)
    assert_covers([shard.parameters for shard in layout.shards], flat_numel(parameters))
    assert_covers([shard.statistics for shard in layout.shards], flat_numel(statistics))
    assert layout.num_parameters == flat_numel(parameters)
    assert layout.num_statistics == flat_numel(statistics)
    assert all(shard.parameters.numel > 0 for shard in layout.shards)


@given(plans())
@settings(deadline=None)
def test_decayed_ranges_equal_a_mask_made_element_by_element(plan):
    parameters, statistics, num_shards = plan
    layout = plan_layout(parameters, statistics, num_shards)
    whole = np.concatenate([mask_of(shard) for shard in layout.shards])
    np.testing.assert_array_equal(whole, brute_force_mask(parameters))
    for shard in layout.shards:
        starts = [span.start for span in shard.decayed]
        assert starts == sorted(starts)
        assert all(span.numel > 0 for span in shard.decayed)


@given(segments_of, statistics_of, st.integers(1, 100))
@settings(deadline=None)
def test_more_shards_than_quanta_are_an_input_error(parameters, statistics, too_many):
    quanta = flat_numel(parameters) // ALIGNMENT
    plan_layout(parameters, statistics, quanta)
    with pytest.raises(InputError, match=rf"num_servers = {quanta + too_many}\b.*1 to {quanta}\b"):
        plan_layout(parameters, statistics, quanta + too_many)


@pytest.mark.parametrize("num_shards", [0, -1])
def test_fewer_than_one_shard_is_an_input_error(num_shards):
    with pytest.raises(InputError, match=f"num_servers = {num_shards}"):
        plan_layout(lay_out([(64, True)]), (), num_shards)


@pytest.fixture(scope="module")
def xception_segments():
    """Xception with the 17,000 classes of JFT: 55,639,952 parameters, 60 % of them in one layer."""
    with torch.device("meta"):
        module = create_model("xception", 17_000)
    return parameter_segments(module), statistic_segments(module)


def joined(ranges):
    """Sorted, touching ranges made one, as (start, stop)."""
    merged: list[list[int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1][1] = stop
        else:
            merged.append([start, stop])
    return merged


@pytest.mark.parametrize("num_shards", range(1, 65))
def test_xception_is_balanced_and_decays_the_same_elements_however_it_is_cut(
    xception_segments, num_shards
):
    parameters, statistics = xception_segments
    layout = plan_layout(parameters, statistics, num_shards)
    assert_balanced(layout)
    assert_covers([shard.parameters for shard in layout.shards], flat_numel(parameters))
    assert_covers([shard.statistics for shard in layout.shards], flat_numel(statistics))
    decayed = [
        (shard.parameters.start + span.start, shard.parameters.start + span.stop)
        for shard in layout.shards
        for span in shard.decayed
    ]
    assert joined(decayed) == joined((s.offset, s.stop) for s in parameters if s.decayed)


def test_xception_segments_are_the_papers_size(xception_segments):
    parameters, _ = xception_segments
    assert sum(segment.numel for segment in parameters) == 55_639_952


def test_another_process_plans_the_same_layout(xception_segments):
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    other = subprocess.run(
        [sys.executable, "-c", DESCRIBE_XCEPTION],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    here = [str(plan_layout(*xception_segments, num_shards)) for num_shards in (1, 7, 64)]
    assert other.stdout.splitlines() == here
