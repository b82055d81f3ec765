"""A run is put together from what a lost server's session left: nothing else may change."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asynception.coordinator import Coordinator
from asynception.ledger import BatchLeases, Ledger, Position
from asynception.origin import Origin
from asynception.salvage import NothingLeft, Remains, assemble, described, sequences_of
from asynception.totals import Totals
from ps.client import ModelState, ahead, behind
from ps.layout import Layout, Range, ShardRanges
from ps.receipts import Settled
from ps.rules import Momentum
from ps.schedule import Clocks
from ps.shard import ShardState, vector_names, vector_range
from worker.data.lease import Lease
from worker.holdings import HeldCopy

NAMES = vector_names(Momentum())
POSITION = Position(96, (Lease(80, 88),))


def layout_of(num_shards: int) -> Layout:
    return Layout(
        tuple(
            ShardRanges(Range(4 * s, 4 * s + 4), Range(2 * s, 2 * s + 2), ())
            for s in range(num_shards)
        )
    )


def random_vectors(layout: Layout, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    last = layout.shards[-1]
    return {n: torch.randn(vector_range(last, n).stop, generator=generator) for n in NAMES}


def part(layout: Layout, shard: int, vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ranges = layout.shards[shard]
    return {n: each[vector_range(ranges, n).slice()].clone() for n, each in vectors.items()}


def remains_of(
    layout: Layout,
    lost: int,
    versions: list[int],
    version: int,
    seed: int = 1,
    samples_twice: int = 0,
) -> Remains:
    vectors = {shard: random_vectors(layout, seed + shard) for shard in range(len(versions))}
    states = {
        shard: ShardState(Clocks(each, 8 * each), part(layout, shard, vectors[shard]))
        for shard, each in enumerate(versions)
        if shard != lost
    }
    held = part(layout, lost, vectors[lost])
    copy = HeldCopy(version, held["parameters"], held["statistics"], {})
    totals = Totals(updates_lost=Counter({lost: 2}), samples_twice=5, pushes=40)
    return Remains(lost, states, 3, copy, POSITION, totals, 12.5, samples_twice)


@st.composite
def losses(draw):
    num_shards = draw(st.integers(2, 5))
    versions = [draw(st.integers(50, 60)) for _ in range(num_shards)]
    return draw(st.integers(0, num_shards - 1)), versions, draw(st.integers(41, 60))


@settings(deadline=None)
@given(losses(), st.integers(0, 2**16))
def test_each_part_is_from_where_it_is_said_to_be_bit_for_bit(loss, seed):
    lost, versions, version = loss
    layout = layout_of(len(versions))
    remains = remains_of(layout, lost, versions, version, seed, 7)
    saved = random_vectors(layout, seed + 100)
    base = Origin(ModelState(Clocks(40, 320), saved, {}), checkpoint="checkpoint-40")
    before = {name: vector.clone() for name, vector in saved.items()}
    origin = assemble(layout, remains, base)
    for shard in range(len(versions)):
        found = part(layout, shard, dict(origin.state.vectors))
        expected = part(layout, shard, saved) if shard == lost else remains.states[shard].vectors
        if shard == lost:
            copy = remains.copy
            expected |= {"parameters": copy.parameters, "statistics": copy.statistics}
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)
        if shard != lost:
            assert origin.shard_clocks[shard] == remains.states[shard].clocks
    assert all(torch.equal(saved[name], before[name]) for name in NAMES), "base is left alone"
    others = [each for shard, each in enumerate(versions) if shard != lost]
    clock = origin.shard_clocks[lost].updates
    assert clock == max(min(others), version)
    assert remains.updates_lost == clock - version
    assert origin.totals.updates_lost == {lost: 2 + remains.updates_lost}
    assert (origin.totals.samples_twice, remains.totals.samples_twice) == (12, 5)
    assert origin.state.clocks.updates == min(clock, *others)
    assert origin.state.version_skew == max(clock, *others) - min(clock, *others)
    assert (origin.position, origin.wall_s, origin.totals.pushes) == (POSITION, 12.5, 40)


@pytest.mark.parametrize("version", [39, 40])
def test_parameters_no_newer_than_the_checkpoint_s_are_of_no_use(version):
    layout = layout_of(2)
    base = Origin(ModelState(Clocks(40, 320), random_vectors(layout, 0), {}), checkpoint="cp-40")
    with pytest.raises(NothingLeft, match="newer ones than cp-40"):
        assemble(layout, remains_of(layout, 0, [50, 50], version), base)


def test_people_are_told_in_one_line_and_of_rounding():
    layout = layout_of(2)
    remains = remains_of(layout, 1, [50, 50], 47)
    base = Origin(ModelState(Clocks(), random_vectors(layout, 0), {}))
    said = described(remains, base, "float32")
    assert said.startswith("server 1 lost 3 updates, the others none")
    assert "worker 3 pulled at version 47," in said
    assert said.endswith("slots and EMA of the start")
    assert "\n" not in said
    named = described(remains, replace(base, checkpoint="cp-1"), "bfloat16")
    assert re.search("version 47, rounded to bfloat16, .*EMA of cp-1", named)
    doubled = described(replace(remains, samples_twice=6), base, "float32")
    assert doubled == f"{said}; 6 samples are trained on twice somewhere"


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(-1, 8), min_size=3, max_size=3), min_size=1, max_size=3),
)
def test_what_all_other_shards_took_is_consumed_and_a_slow_checkpoint_is_not_upset(leases, settled):
    """Consumed and open make up all that was handed out."""
    ledger = Ledger(200, 2, BatchLeases(2, 3))
    control = Coordinator(ledger, Totals())
    for worker in range(3):
        control.enlist(worker)
    given_to = Counter[int]()
    for worker, _ in leases:
        given_to[worker] += control.lease(worker, 0).num_samples
    shards = [
        {w: {0: min(last[w], given_to[w] // 2 - 1)} for w in range(3) if given_to[w]}
        for last in settled
    ]
    sequences = behind(shards)
    cut = {worker: {0: min(0, life[0])} for worker, life in sequences.items()}
    before = control.position(cut, False)
    position = control.position(sequences, False)
    consumed = sum(2 * (life[0] + 1) for life in sequences.values())
    assert position.num_consumed == consumed
    assert position.frontier == consumed + sum(lease.num_samples for lease in position.open)
    # A checkpoint that was cut before, and asks after, is told what it would have been told.
    assert control.position(cut) == before


BATCH, NUM_BATCHES = 2, 6


@st.composite
def deaths(draw):
    """Of one worker: how far the pushes of its first life had come, if it died."""
    everywhere = draw(st.integers(-1, NUM_BATCHES - 1))
    return Settled(everywhere, draw(st.integers(everywhere, NUM_BATCHES - 1)))


@settings(deadline=None)
@given(st.lists(st.none() | deaths(), min_size=2, max_size=2), st.data())
def test_samples_are_counted_twice_where_one_part_has_a_push_and_not_all_others(died, data):
    """Once each, however many parts have it; what a death was counted for is not counted again."""
    ledger = Ledger(1000, BATCH, BatchLeases(BATCH, NUM_BATCHES))
    control = Coordinator(ledger, Totals())
    others: list[dict[int, dict[int, int]]] = [{}, {}]
    of_copy, expected = {}, 0
    for worker, settled in enumerate(died):
        life, lease = control.enlist(worker), control.lease(worker, 0)
        if settled is not None:
            control.end(worker, settled, life)
            life, lease = control.enlist(worker), control.lease(worker, 1)
        last = st.integers(-1, lease.num_batches(BATCH) - 1)
        lasts = [data.draw(last), data.draw(last)]
        newest = data.draw(st.none() | last)
        of_copy |= {} if newest is None else {worker: (life, newest)}
        expected += max(*lasts, -1 if newest is None else newest) - min(lasts)
        for known, each in zip(others, lasts, strict=True):
            known[worker] = {life: each}
        if settled is not None:
            # The sum for a version may have held its last push, which is then in no state.
            ends = st.integers(max(-1, settled.everywhere - 1), settled.somewhere)
            for known in others:
                known[worker][0] = data.draw(ends)
            least, *_, most = sorted(known[worker][0] for known in others)
            most = most if newest is None else settled.everywhere
            expected += max(0, min(most, settled.everywhere) - least)
    everywhere = behind(others)
    somewhere = ahead([*others, sequences_of(of_copy, everywhere)])
    assert control.num_samples_twice(everywhere, somewhere) == BATCH * expected
