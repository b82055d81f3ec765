"""Mistakes that the simulation must find, each planted in the real code by a patch."""

from contextlib import AbstractContextManager
from dataclasses import replace
from unittest import mock

import torch

from asynception.coordinator import Coordinator
from asynception.journal import JournaledCoordinator
from asynception.ledger import Ledger
from asynception.simulate.world import current
from asynception.staff import Staff
from asynception.supervisor import Supervisor
from ps.operations import Expect, perform
from ps.pace import Pace
from ps.receipts import WorkerRecord
from ps.service import ShardService
from ps.shard import Shard
from ps.snapshot import Snapshots
from worker.rounds import _MAKES_NEXT, Rounds


def forget_what_was_settled() -> AbstractContextManager:
    """A push that comes again is taken for a new one."""

    def note(self, sequence, receipt):
        self.receipts[sequence] = receipt

    return mock.patch.object(WorkerRecord, "note", note)


def release_a_pin_twice() -> AbstractContextManager:
    """A buffer is written again while somebody still reads it."""
    unpin = Snapshots._unpin

    def unpin_twice(self, snapshot):
        unpin(self, snapshot)
        if snapshot.pins:
            unpin(self, snapshot)

    def release(self, snapshot):
        with self._lock:
            if snapshot.pins:
                self._unpin(snapshot)

    return mock.patch.multiple(Snapshots, _unpin=unpin_twice, release=release)


def write_into_a_pinned_buffer() -> AbstractContextManager:
    """The last version's buffer is taken for the next but one, whoever reads it."""

    def publish(self, snapshot, version):
        snapshot.version = version
        previous, self._newest = self._newest, snapshot
        self._spare.append(previous)

    return mock.patch.object(Snapshots, "publish", publish)


def acknowledge_before_applying() -> AbstractContextManager:
    """A push is applied a little after its receipt, unless the server dies first."""
    apply = ShardService.push

    def push(self, push):
        shard, world = self._loaded(), current()
        vectors = {"gradient": push.gradient.clone()}
        vectors["statistics_delta"] = push.statistics_delta.clone()
        held = replace(push, **vectors)
        world.call_at(world.now_s + 0.05, world.party, lambda: apply(self, held))
        return shard._receipt(shard._judge(push), push)

    return mock.patch.object(ShardService, "push", push)


def let_the_dead_push() -> AbstractContextManager:
    """A life that was declared dead goes on to write."""

    def fence(self, worker, incarnation):
        record = self._records.get(worker)
        return dict(record.last_sequences) if record else {}

    return mock.patch.object(Shard, "fence", fence)


def announce_nobody() -> AbstractContextManager:
    """Shards wait for workers that are done."""
    return mock.patch.object(Supervisor, "_announce", return_value=None)


def count_a_push_too_many() -> AbstractContextManager:
    """The ledger takes a push that is under way for settled."""

    def batches_in(self, last_sequence):
        return (last_sequence + 2) * (self._batches_per_push or 1)

    return mock.patch.object(Ledger, "_batches_in", batches_in)


def let_anyone_run_ahead() -> AbstractContextManager:
    """The bound on staleness is not kept."""
    return mock.patch.object(Pace, "may_begin", return_value=True)


def keep_silent_of_samples_taken_twice() -> AbstractContextManager:
    """What some shards, but not all, took from a dead worker is not counted."""
    return mock.patch.object(Ledger, "num_samples_between", return_value=0)


def hand_out_again_what_was_asked_for_again() -> AbstractContextManager:
    """A lease whose answer a death of the coordinator lost is nobody's."""
    lease = Coordinator.lease

    def lease_anew(self, worker, incarnation, number=None):
        return lease(self, worker, incarnation)

    return mock.patch.object(Coordinator, "lease", lease_anew)


def forget_leases_at_a_death() -> AbstractContextManager:
    """The coordinator's journal holds everything but what was handed out."""
    note = JournaledCoordinator._note

    def note_others(self, name, *arguments):
        if name != "lease":
            note(self, name, *arguments)

    return mock.patch.object(JournaledCoordinator, "_note", note_others)


def salvage_before_the_others_stopped() -> AbstractContextManager:
    """Live shards go on taking pushes after their state was copied."""

    def stop(shard, lives):
        shard.cut("salvage", 0, 0.0, ())
        state = shard.read("salvage", lambda _, numel: torch.empty(numel))
        current().sleep(0.3)
        return state, shard.describe()

    return mock.patch("asynception.salvage._stop", stop)


def count_rounds_shard_by_shard() -> AbstractContextManager:
    """In sync mode, a worker waits for the version after the one that it found at each shard."""

    def begin(self, pulled):
        self.found = pulled
        return pulled

    def end(self, receipts):
        self.at_least = [
            version + (receipt.outcome in _MAKES_NEXT)
            for version, receipt in zip(self.found, receipts, strict=True)
        ]

    return mock.patch.multiple(Rounds, begin=begin, end=end)


def take_who_leaves_for_done() -> AbstractContextManager:
    """The lease of a worker that leaves is not given back."""

    def part_with(self, worker, why):
        self._end(worker)

    return mock.patch.object(Supervisor, "_part_with", part_with)


def wait_for_who_has_no_room() -> AbstractContextManager:
    """Shards aren't told that of a range of workers nobody has entered yet."""
    open_places = Staff.open

    def open_silently(self):
        open_places(self)
        return False

    return mock.patch.object(Staff, "open", open_silently)


def heed_late_words() -> AbstractContextManager:
    """A shard heeds each word of who is at work, be there a newer one or not."""

    def perform_all(shard, operation):
        if isinstance(operation, Expect):
            shard.expect(operation.workers)
            return None
        return perform(shard, operation)

    return mock.patch("ps.service.perform", perform_all)


def keep_silent_of_places_left_empty() -> AbstractContextManager:
    """Shards aren't told of places that have had no worker, and are to have none."""
    start_due = Supervisor.start_due

    def start_silently(self, num_consumed):
        if self._room.workers.comes_and_goes:
            start_due(self, num_consumed)
            return
        with mock.patch.object(self, "_announce"):
            start_due(self, num_consumed)

    return mock.patch.object(Supervisor, "start_due", start_silently)


def load_at_any_time() -> AbstractContextManager:
    """A state may be loaded over what was pushed since."""
    return mock.patch.object(ShardService, "_check_in_time")


def overlook_what_a_held_copy_has() -> AbstractContextManager:
    """Of a lost server's parameters, only the version is known."""
    return mock.patch("asynception.salvage.sequences_of", return_value={})


def overlook_what_is_done_again() -> AbstractContextManager:
    """Going on without a server, nobody counts what some shards have, and not all."""
    return mock.patch.object(Coordinator, "num_samples_twice", return_value=0)


def overlook_what_a_checkpoint_does_again() -> AbstractContextManager:
    """Going on from a checkpoint, nobody counts what some shards had, and not all."""

    def at_cut(self, everywhere, somewhere):
        return self.position(everywhere), self.progress()

    return mock.patch.object(Coordinator, "at_cut", at_cut)


PLANTED = {
    forget_what_was_settled: 2,
    release_a_pin_twice: 5,
    write_into_a_pinned_buffer: 5,
    acknowledge_before_applying: 0,
    let_the_dead_push: 3,
    announce_nobody: 10,
    count_a_push_too_many: 0,
    let_anyone_run_ahead: 10,
    keep_silent_of_samples_taken_twice: 3,
    hand_out_again_what_was_asked_for_again: 42,
    forget_leases_at_a_death: 3,
    salvage_before_the_others_stopped: 3,
    count_rounds_shard_by_shard: 32,
    overlook_what_a_checkpoint_does_again: 4,
}
"""Each with the first seed that finds it."""

PLANTED_IF = {
    take_who_leaves_for_done: (5, "elastic"),
    wait_for_who_has_no_room: (203, "elastic"),
    heed_late_words: (200, "elastic"),
    keep_silent_of_places_left_empty: (67, "elastic", "losses"),
    load_at_any_time: (340, "harsh"),
}
"""Found from this seed on, with these settings of `simulate`."""

PLANTED_IN_LOSSES = {
    overlook_what_a_held_copy_has: 29,
    overlook_what_is_done_again: 4,
}
"""Found where more befalls servers, from this seed on."""
