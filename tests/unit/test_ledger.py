"""The ledger against a brute-force model that knows of every single position what became of it."""

import json
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asynception.ledger import START, BatchLeases, Ledger, Position, WindowLeases
from worker.data.lease import Lease
from worker.data.order import EpochOrder

batch_sizes = st.integers(1, 4)
lease_lengths = st.integers(1, 3)


def batches_of(lease: Lease, batch_size: int) -> list[range]:
    """What a worker's loader makes of a lease."""
    parts = np.array_split(np.arange(lease.start, lease.stop), -(-lease.num_samples // batch_size))
    sizes = sorted(len(part) for part in parts)
    assert sizes[-1] <= batch_size
    bounds = [lease.start + n * lease.num_samples // len(parts) for n in range(len(parts) + 1)]
    ranges = [range(*pair) for pair in pairwise(bounds)]
    assert sorted(map(len, ranges)) == sizes, "as even as can be"
    return ranges


def positions(ranges) -> list[int]:
    return list(chain.from_iterable(ranges))


def consumed(position: Position) -> set[int]:
    """The positions that a `Position` says are done."""
    waiting = positions(range(lease.start, lease.stop) for lease in position.open)
    assert len(waiting) == len(set(waiting))
    assert all(0 <= each < position.frontier for each in waiting)
    return set(range(position.frontier)) - set(waiting)


@st.composite
def lease_ends(draw, batch_size: int, lease_length: int):
    """So many batches, or whole windows of some order, which end anywhere."""
    if draw(st.booleans()):
        return BatchLeases(batch_size, lease_length)
    sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any))
    return WindowLeases(EpochOrder(sizes, draw(st.integers(0, 9)), draw(st.integers(0, 12))))


class Life:
    """One incarnation: all its batches in the order of their pushes, and how many are pushed."""

    def __init__(self, worker: int, incarnation: int) -> None:
        self.worker, self.incarnation = worker, incarnation
        self.batches: list[range] = []
        self.num_done = 0
        self.alive = True


def done_in(
    lives: list[Life], sequences: dict[int, dict[int, int]], local_steps: int | None = 1
) -> list[int]:
    """Positions that are in a state with these newest sequences."""
    pushes = (sequences.get(life.worker, {}).get(life.incarnation, -1) + 1 for life in lives)
    pairs = zip(lives, pushes, strict=True)
    kept = (life.batches[: n * (local_steps or len(life.batches))] for life, n in pairs)
    return positions(chain.from_iterable(kept))


class Interleavings(RuleBasedStateMachine):
    """Workers lease, push, die and return in any order, while states are cut and asked about.

    Two ledgers do the same, of which one never forgets.
    """

    WORKERS = st.integers(0, 2)

    @initialize(
        batch_size=batch_sizes,
        lease_length=lease_lengths,
        num_batches=st.integers(0, 25),
        d=st.data(),
    )
    def begin(self, batch_size: int, lease_length: int, num_batches: int, d) -> None:
        rest = d.draw(st.integers(0, batch_size - 1))
        self.total, self.batch_size = batch_size * num_batches + rest, batch_size
        self.lease_end = d.draw(lease_ends(batch_size, lease_length))
        self.start = d.draw(starts(self.total))
        self.local_steps = d.draw(st.sampled_from([1, 1, 2, 3, None]))
        arguments = (self.total, batch_size, self.lease_end, self.start, self.local_steps)
        self.ledger, self.remembering = Ledger(*arguments), Ledger(*arguments)
        self.lives: list[Life] = []
        self.current: dict[int, Life] = {}
        self.leased: list[int] = []
        self.left: list[int] = []
        self.twice: list[int] = []
        self.cuts: list[dict[int, dict[int, int]]] = []

    def both(self, call):
        first, second = call(self.ledger), call(self.remembering)
        assert first == second
        return first

    def life_of(self, worker: int) -> Life:
        if worker not in self.current:
            incarnation = sum(life.worker == worker for life in self.lives)
            self.current[worker] = Life(worker, incarnation)
            self.lives.append(self.current[worker])
        return self.current[worker]

    @rule(worker=WORKERS)
    def lease(self, worker: int) -> None:
        life = self.life_of(worker)
        available = self.both(lambda ledger: ledger.available)
        lease = self.both(lambda ledger: ledger.lease(worker, life.incarnation))
        assert (lease is not None) == available
        if lease is None:
            return
        assert lease.start < lease.stop <= self.lease_end(lease.start)
        life.batches += batches_of(lease, self.batch_size)
        self.leased += range(lease.start, lease.stop)
        assert self.ledger.num_batches(worker, life.incarnation) == len(life.batches)

    @rule(worker=WORKERS, num_batches=st.integers(1, 4))
    def push(self, worker: int, num_batches: int) -> None:
        life = self.life_of(worker)
        life.num_done = self.pushed(min(len(life.batches), life.num_done + num_batches))

    @rule(worker=WORKERS, num_lost=st.sampled_from([0, 0, 1, 2]))
    def die(self, worker: int, num_lost: int) -> None:
        """The last `num_lost` pushes reached some shards, but not all.

        Never fewer than the last cut had: what all shards have settled only grows.
        """
        life = self.life_of(worker)
        in_a_cut = [
            self.batches(cut.get(worker, {}).get(life.incarnation, -1)) for cut in self.cuts
        ]
        all_done = life.num_done == len(life.batches) and num_lost == 0
        done = life.num_done if all_done else self.pushed(max(0, life.num_done - num_lost))
        settled = max([done, *in_a_cut[-1:]])
        self.twice += positions(life.batches[settled : life.num_done])
        life.num_done, life.alive = settled, False
        last = self.sequence(settled)
        if all_done:
            assert last == self.ledger.last_sequence(worker, life.incarnation)
        left = self.both(lambda ledger: ledger.end(worker, life.incarnation, last))
        lost = positions(life.batches[settled:])
        assert left == len(lost)
        self.left += lost
        del self.current[worker]

    @rule()
    def progress(self) -> None:
        """Of all that is settled by now, which cuts needn't hold yet."""
        sequences = self.sequences()
        expected = self.remembering.position(sequences, forget=False).num_consumed
        assert self.both(lambda ledger: ledger.num_consumed(sequences)) == expected

    @rule()
    def cut(self) -> None:
        self.cuts.append(self.sequences())

    @precondition(lambda self: self.cuts)
    @rule(d=st.data())
    def ask(self, d) -> None:
        """About a cut made a while ago, each after those before it."""
        which = d.draw(st.integers(0, len(self.cuts) - 1))
        sequences, self.cuts = self.cuts[which], self.cuts[which:]
        expected = done_in(self.lives, sequences, self.local_steps)
        position = self.ledger.position(sequences)
        assert position == self.remembering.position(sequences, forget=False)
        assert consumed(position) == consumed(self.start) | set(expected)
        assert position.num_consumed == self.start.num_consumed + len(expected)
        again = Position.from_json(json.loads(json.dumps(position.to_json())))
        assert again == position

    def sequences(self) -> dict[int, dict[int, int]]:
        sequences: dict[int, dict[int, int]] = {}
        for life in self.lives:
            if life.num_done:  # shards know nothing of lives that pushed nothing
                last = self.sequence(life.num_done)
                sequences.setdefault(life.worker, {})[life.incarnation] = last
        return sequences

    def pushed(self, num_batches: int) -> int:
        """Of so many batches, those that whole pushes hold."""
        return num_batches - num_batches % self.local_steps if self.local_steps else 0

    def sequence(self, num_batches: int) -> int:
        """The push that holds the last of so many batches, -1 for none."""
        return -(-num_batches // (self.local_steps or max(1, num_batches))) - 1

    def batches(self, sequence: int) -> int:
        """Batches that are in the pushes up to one that is not the last of its life."""
        return (sequence + 1) * (self.local_steps or 0)

    @invariant()
    def finished_when_nothing_is_left_to_do(self) -> None:
        if not hasattr(self, "ledger"):
            return
        handed_out = sorted(set(self.leased) | consumed(self.start)) == list(
            range(max(self.total, self.start.frontier))
        )
        nothing_back = len(self.leased) - len(self.left) == len(set(self.leased))
        at_work = any(life.alive and life.batches for life in self.lives)
        finished = self.both(lambda ledger: ledger.finished)
        assert finished == (handed_out and nothing_back and not at_work)
        assert self.ledger.available == (not (handed_out and nothing_back))

    def teardown(self) -> None:
        """However it went, new workers bring it to its end."""
        if not hasattr(self, "ledger"):
            return
        for worker in list(self.current):
            self.life_of(worker).num_done = len(self.life_of(worker).batches)
            self.die(worker, 0)
        while not self.ledger.finished:
            self.lease(9)
            self.life_of(9).num_done = len(self.life_of(9).batches)
            if not self.ledger.available:
                self.die(9, 0)
        done = Counter(
            positions(batch for life in self.lives for batch in life.batches[: life.num_done])
        )
        everything = set(range(max(self.total, self.start.frontier)))
        assert set(done) == everything - consumed(self.start)
        assert set(done.values()) <= {1}
        again = Counter(self.leased) - Counter(done)
        assert again == Counter(self.left), "only what was left is handed out again"
        assert set(self.twice) <= set(self.left)
        final = self.ledger.position(self.sequences())
        assert final == Position(max(self.total, self.start.frontier), ())


@st.composite
def starts(draw, total: int) -> Position:
    """A position that some earlier session, of another batch size, may have left."""
    if draw(st.booleans()):
        return START
    frontier = draw(st.integers(0, total + 3))
    bounds = sorted(draw(st.sets(st.integers(0, frontier), max_size=6)))
    pairs = zip(bounds[::2], bounds[1::2], strict=False)
    return Position(frontier, tuple(Lease(*pair) for pair in pairs))


def test_any_interleaving_agrees_with_brute_force():
    run_state_machine_as_test(
        Interleavings,
        settings=settings(
            max_examples=150,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@settings(deadline=None)
@given(batch_sizes, lease_lengths, st.integers(0, 30), st.data())
def test_without_deaths_every_position_is_leased_once(batch_size, lease_length, num_batches, data):
    total = batch_size * num_batches
    ledger = Ledger(total, batch_size, BatchLeases(batch_size, lease_length))
    leased = []
    working = {0, 1, 2}
    last = {}
    while working:
        worker = data.draw(st.sampled_from(sorted(working)))
        lease = ledger.lease(worker, 0)
        if lease is None:
            last[worker] = {0: ledger.num_batches(worker, 0) - 1}
            ledger.end(worker, 0, last[worker][0])
            working.remove(worker)
        else:
            leased += range(lease.start, lease.stop)
            assert not ledger.finished
    assert sorted(leased) == list(range(total))
    assert ledger.finished
    assert ledger.position(last) == Position(total, ())


@settings(deadline=None)
@given(st.data(), batch_sizes, lease_lengths, batch_sizes, lease_lengths, st.integers(1, 6))
def test_a_resume_consumes_exactly_the_rest(data, batch_1, lease_1, batch_2, lease_2, factor):
    """Also with another batch size, and with a larger or smaller budget."""
    total = batch_1 * batch_2 * factor
    ledger = Ledger(total, batch_1, BatchLeases(batch_1, lease_1))
    lives = [Life(worker, 0) for worker in range(3)]
    for _ in range(data.draw(st.integers(0, 12))):
        life = data.draw(st.sampled_from(lives))
        lease = ledger.lease(life.worker, 0)
        life.batches += batches_of(lease, batch_1) if lease else []
        life.num_done = data.draw(st.integers(life.num_done, len(life.batches)))
    sequences = {life.worker: {0: life.num_done - 1} for life in lives}
    before = done_in(lives, sequences)
    position = Position.from_json(json.loads(json.dumps(ledger.position(sequences).to_json())))
    assert position.num_consumed == len(before)

    budget = batch_2 * data.draw(st.integers(0, 2 * batch_1 * factor))
    resumed = Ledger(budget, batch_2, BatchLeases(batch_2, lease_2), position)
    assert resumed.position({}, forget=False) == position
    after = []
    while (lease := resumed.lease(0, 0)) is not None:
        after += range(lease.start, lease.stop)
        assert lease.num_samples <= batch_2 * lease_2
    last = resumed.num_batches(0, 0) - 1
    resumed.end(0, 0, last)
    assert sorted(before + after) == list(range(max(budget, position.frontier)))
    assert resumed.finished
    assert resumed.position({0: {0: last}}) == Position(max(budget, position.frontier), ())


def test_a_life_that_has_ended_gets_nothing_and_does_not_end_again():
    ledger = Ledger(8, 2, BatchLeases(2, 2))
    ledger.lease(0, 0)
    assert ledger.end(0, 0, 0) == 2
    with pytest.raises(AssertionError):
        ledger.lease(0, 0)
    with pytest.raises(AssertionError):
        ledger.end(0, 0, 1)


def test_positions_are_joined_where_they_touch():
    ledger = Ledger(12, 2, BatchLeases(2, 1))
    for worker in (0, 1, 2, 0, 1):
        ledger.lease(worker, 0)
    assert ledger.position({0: {0: 0}, 1: {0: 1}}) == Position(10, (Lease(4, 8),))


@settings(deadline=None)
@given(st.data(), st.lists(st.integers(0, 9), min_size=2, max_size=12).filter(any))
def test_whole_windows_make_one_worker_read_a_shard(data, sizes):
    """Once an epoch, unless a death hands a part of its window out again."""
    order = EpochOrder(sizes, data.draw(st.integers(0, 9)), data.draw(st.integers(0, 20)))
    num_epochs, batch_size = 2, data.draw(st.integers(1, 5))
    ledger = Ledger(num_epochs * sum(sizes), batch_size, WindowLeases(order))
    readers: Counter[tuple[int, int]] = Counter()
    while (lease := ledger.lease(data.draw(st.integers(0, 3)), 0)) is not None:
        epoch = lease.start // sum(sizes)
        readers.update((epoch, shard) for shard in order.shards(lease.start, lease.stop))
    filled = [shard for shard, size in enumerate(sizes) if size]
    assert readers == Counter((epoch, shard) for epoch in range(num_epochs) for shard in filled)
