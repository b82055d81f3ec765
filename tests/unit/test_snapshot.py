"""Snapshots: a pinned version never changes, and memory is bounded by the readers."""

import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ps.snapshot import Snapshot, Snapshots, max_buffers

NUMEL = 8
DEADLINE_S = 60


def snapshots_at_zero(numel=NUMEL, allocate=torch.empty):
    return Snapshots(Snapshot(0, torch.zeros(numel), torch.zeros(2)), allocate)


def fill(snapshot, value):
    snapshot.parameters.fill_(value)
    snapshot.statistics.fill_(-value)


def assert_holds(snapshot, version):
    """Whole and unchanged: what the writer wrote into it as `version`."""
    assert snapshot.version == version
    assert (snapshot.parameters == version).all()
    assert (snapshot.statistics == -version).all()


class AnyOrder(RuleBasedStateMachine):
    """Pins, releases, half-done writes and publications in any order.

    The exact number of buffers: each write needs a buffer besides the newest and the older ones
    that are still pinned, and a buffer once made is kept. So it is the largest value, over all
    writes so far, of 2 + the pinned versions older than the newest at the time of the write; R
    readers that hold a pin each bound it by 2 + R.
    """

    def __init__(self):
        super().__init__()
        self.allocated: list[torch.Tensor] = []
        self.snapshots = snapshots_at_zero(allocate=self.allocate)
        self.version = 0
        self.held: list[tuple[Snapshot, int]] = []
        self.writing: Snapshot | None = None
        self.expected_buffers = 1
        self.most_held = 0

    def allocate(self, numel):
        self.allocated.append(torch.empty(numel))
        return self.allocated[-1]

    @rule()
    def pin(self):
        snapshot = self.snapshots.pin()
        assert_holds(snapshot, self.version)
        self.held.append((snapshot, self.version))
        self.most_held = max(self.most_held, len(self.held))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.held) - 1))
        snapshot, _ = self.held.pop(index)
        self.snapshots.release(snapshot)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def die(self, data):
        """A reader that held several pins: whoever notices its end gives all of them back."""
        ends = data.draw(st.sets(st.integers(0, len(self.held) - 1)))
        for index in sorted(ends, reverse=True):
            self.snapshots.release(self.held.pop(index)[0])

    @precondition(lambda self: self.writing is None)
    @rule()
    def begin_write(self):
        older = {version for _, version in self.held} - {self.version}
        self.expected_buffers = max(self.expected_buffers, 2 + len(older))
        self.writing = self.snapshots.next_buffer()
        fill(self.writing, torch.nan)

    @precondition(lambda self: self.writing is not None)
    @rule()
    def publish(self):
        self.version += 1
        fill(self.writing, self.version)
        self.snapshots.publish(self.writing, self.version)
        self.writing = None

    @invariant()
    def what_is_pinned_is_unchanged(self):
        for snapshot, version in self.held:
            assert_holds(snapshot, version)
        assert_holds(self.snapshots.newest, self.version)

    @invariant()
    def buffers_are_as_few_as_can_be(self):
        in_writing = self.writing is not None
        assert self.snapshots.num_buffers + in_writing == self.expected_buffers
        assert self.expected_buffers <= max_buffers(self.most_held)
        assert len(self.allocated) == self.expected_buffers - 1  # the first one was given


AnyOrder.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestAnyOrder = AnyOrder.TestCase


def publish_next(snapshots, version):
    buffer = snapshots.next_buffer()
    fill(buffer, version)
    snapshots.publish(buffer, version)


def test_two_buffers_do_without_readers():
    snapshots = snapshots_at_zero()
    for version in range(1, 50):
        publish_next(snapshots, version)
    assert snapshots.num_buffers == 2


def test_a_released_buffer_is_written_again():
    snapshots = snapshots_at_zero()
    first = snapshots.pin()
    publish_next(snapshots, 1)
    snapshots.release(first)
    assert snapshots.next_buffer() is first


def test_a_version_pinned_twice_is_kept_until_the_second_release():
    snapshots = snapshots_at_zero()
    first = snapshots.pin()
    assert snapshots.pin() is first
    publish_next(snapshots, 1)
    snapshots.release(first)
    for version in range(2, 6):
        publish_next(snapshots, version)
    assert_holds(first, 0)
    snapshots.release(first)


@pytest.mark.parametrize("num_newer", [0, 1, 2])
def test_releasing_more_often_than_pinning_is_a_bug(num_newer):
    snapshots = snapshots_at_zero()
    snapshot = snapshots.pin()
    for version in range(1, num_newer + 1):
        publish_next(snapshots, version)
    snapshots.release(snapshot)
    with pytest.raises(AssertionError, match="more often than pinned"):
        snapshots.release(snapshot)


def test_readers_in_threads_see_whole_versions_while_a_thread_writes():
    """Each pinned version is read twice, element by element, with writes in between."""
    snapshots = snapshots_at_zero(numel=4096)
    enough, torn = threading.Event(), []
    reads = [0, 0, 0]

    def read(reader):
        while not enough.is_set():
            snapshot = snapshots.pin()
            version = snapshot.version
            seen = [snapshot.parameters.clone(), snapshot.parameters.clone()]
            if any((vector != version).any() for vector in seen):
                torn.append(version)
            snapshots.release(snapshot)
            reads[reader] += 1

    readers = [threading.Thread(target=read, args=(reader,), daemon=True) for reader in range(3)]
    for reader in readers:
        reader.start()
    version = 0
    while version < 300 or min(reads) < 50:
        version += 1
        publish_next(snapshots, version)
    enough.set()
    for reader in readers:
        reader.join(DEADLINE_S)
    assert not torn
    assert snapshots.num_buffers <= max_buffers(len(readers))


@pytest.mark.parametrize("num_statistics", [0, 2])
def test_both_vectors_of_a_buffer_lie_in_one_piece_of_the_given_memory(num_statistics):
    allocated = []

    def allocate(numel):
        allocated.append(torch.full((numel,), torch.nan))
        return allocated[-1]

    parameters, statistics = torch.arange(NUMEL) * 1.5, torch.arange(num_statistics) + 0.5
    first = Snapshot.copy_of(7, parameters, statistics, {}, allocate)
    assert torch.equal(first.parameters, parameters)
    assert torch.equal(first.statistics, statistics)
    assert first.version == 7
    second = Snapshots(first, allocate).next_buffer()
    assert (second.parameters.numel(), second.statistics.numel()) == (NUMEL, num_statistics)
    for snapshot, memory in zip((first, second), allocated, strict=True):
        assert memory.numel() == NUMEL + num_statistics
        assert snapshot.parameters.data_ptr() == memory.data_ptr()
        if num_statistics:
            assert snapshot.statistics.data_ptr() == memory[NUMEL:].data_ptr()
