"""Mistakes in replication that the simulation must find, each planted in the real code."""

from collections import deque
from contextlib import AbstractContextManager
from functools import partial
from unittest import mock

from asynception.simulate.world import current
from ps.push import Order
from ps.replica import LinkDown, Replica, ReplicaState, _own
from ps.standby import OutOfTurn, Standby


def acknowledge_before_the_standby_has_it() -> AbstractContextManager:
    """The standby hears of each operation a little after its answer, in order."""
    take = Replica.take

    def tell(replica, waiting):
        while waiting and replica.is_active:
            index, operation = waiting[0]
            replica._persist(partial(replica._link.follow, Order(replica.epoch, index), operation))
            waiting.popleft()

    def answer_first(self, index, operation):
        if self.state is not ReplicaState.IN_STEP:
            return take(self, index, operation)
        waiting = self.__dict__.setdefault("waiting", deque())
        waiting.append((index, _own(operation)))
        if len(waiting) == 1:
            world = current()
            world.spawn(world.party, lambda: tell(self, waiting), world.now_s + 0.02)
        return None

    return mock.patch.object(Replica, "take", answer_first)


def forget_the_deduplication_table_on_promotion() -> AbstractContextManager:
    """A promoted standby takes what was settled for new."""
    promote = Standby.promote

    def promote_and_forget(self, epoch):
        shard, index = promote(self, epoch)
        for record in shard._records.values():
            record.last_sequences.clear()
        return shard, index

    return mock.patch.object(Standby, "promote", promote_and_forget)


def seed_without_the_deduplication_table() -> AbstractContextManager:
    """An image has parameters, and not what was settled."""
    seed = Standby.seed

    def seed_and_forget(self, order, image):
        for record in image.records.values():
            record.last_sequences.clear()
        seed(self, order, image)

    return mock.patch.object(Standby, "seed", seed_and_forget)


def go_on_without_being_told_to() -> AbstractContextManager:
    """A primary takes a standby that doesn't answer for dead."""
    persist = Replica._persist

    def give_up_at_once(self, call):
        def once():
            try:
                return call()
            except LinkDown:
                self.give_up()
                return None

        return persist(self, once)

    return mock.patch.object(Replica, "_persist", give_up_at_once)


def let_the_stale_write() -> AbstractContextManager:
    """One in whose place another is, is told that something is wrong with its standby."""

    def refuse(self, order):
        if self._is_promoted:
            raise OutOfTurn("not a standby")

    return mock.patch.object(Standby, "_check_epoch", refuse)


PLANTED = {
    acknowledge_before_the_standby_has_it: 0,
    forget_the_deduplication_table_on_promotion: 0,
    seed_without_the_deduplication_table: 67,
    go_on_without_being_told_to: 7,
    let_the_stale_write: 312,
}
"""Each with the first seed that finds it."""
