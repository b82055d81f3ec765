"""Mistakes in moving servers that the simulation must find, each planted in the real code."""

import contextlib
from contextlib import AbstractContextManager
from unittest import mock

import grpc

from asynception.keeper import Keeper
from ps.replicated import ReplicatedService
from ps.retry import ShardUnavailable
from ps.standby import NotInStep, Standby


def promote_before_the_standby_is_in_step() -> AbstractContextManager:
    """A server moves once its standby has begun to be seeded, and that one doesn't mind."""

    def attached(self, standby):
        with contextlib.suppress(ShardUnavailable, grpc.RpcError):
            self._client(self._primary).attach(standby.address, self._epoch)
        return True

    def promote(self, epoch):
        if self._shard is None:
            raise NotInStep
        self._epoch, self._is_promoted = epoch, True
        return self._shard, self._next_index

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(Keeper, "_attached", attached))
    stack.enter_context(mock.patch.object(Standby, "promote", promote))
    return stack


def let_the_old_one_answer() -> AbstractContextManager:
    """A server in whose place another is lets go of that one, and goes on."""

    def retire(self, why):
        with self._turns:
            replica, self._replica = self._replica, None
        if replica is not None:
            replica.give_up()

    return mock.patch.object(ReplicatedService, "_retire", retire)


def overtake_what_waits() -> AbstractContextManager:
    """What comes when the standby has been given up is carried out before what waited for it."""
    return mock.patch.object(
        ReplicatedService, "_is_alone", property(lambda self: self._replica is None)
    )


PLANTED = {
    promote_before_the_standby_is_in_step: (0, 18),
    let_the_old_one_answer: (0, 18),
    overtake_what_waits: (1, 27),
}
"""Each with the number of replicas, and the first seed that finds it then."""
