"""A shard's service with a standby: as a primary that has one, and as the standby itself.

A run's session says which server is what, and numbers these changes with rising epochs. A primary
never goes on without its standby by itself: it can't tell a dead one from one that has been put in
its place.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ps.image import Image
from ps.lanes.segment import shared_zeros
from ps.messages import ReplicaStatus, ShardStatus
from ps.operations import Operation, has_effect
from ps.push import Order, Push
from ps.receipts import Receipt
from ps.replica import ENDLESS_S, Link, Replica, ReplicaState
from ps.service import LateLoad, ShardService
from ps.shard import Shard, ShardConfig, ShardState
from ps.snapshot import Allocate
from ps.standby import CHECK_EVERY, Echo, OutOfTurn, Standby, Superseded, checksum_due

MAX_TURN_WAIT_S = 10.0
"""A call that waits longer for its turn is refused, and made again: it would hold a thread."""


_log = logging.getLogger(__name__)


class Retired(ConnectionError):
    """Another server has taken this one's place: the call is to be made there."""


class Busy(ConnectionError):
    """The standby takes its time: the call may be made again."""


class StandbyLost(RuntimeError):
    """A standby did not come in step."""


class ReplicatedService(ShardService):
    """The door to a shard that has a standby, or is one. As a standby it refuses all callers but
    its primary, as a shard without a state does.

    Operations are numbered in the order in which they get their turn, in which the standby carries
    them out and then this shard does. While this one does, the next one travels.
    """

    def __init__(
        self,
        config: ShardConfig,
        clock: Callable[[], float] = time.perf_counter,
        allocate: Allocate = shared_zeros,
        check_every: int = CHECK_EVERY,
        is_paired: bool = True,
    ) -> None:
        """is_paired: whether it is to have a standby all the time, so that its status says when it
        has none; else only while it moves to another server."""
        super().__init__(config, clock, allocate)
        assert not config.policy.compensation, "images lack what workers pulled"
        self._check_every, self._is_paired = check_every, is_paired
        self._turns = threading.Condition(self._lock)
        self._is_taken = False
        self._num_claims = 0
        self._num_logged = self._num_performed = 0
        self._epoch = 0
        self._replica: Replica | None = None
        self._is_retired = False
        self._waited_s = 0.0
        self._standby = Standby(config, allocate, check_every)

    def load(self, state: ShardState) -> None:
        """See `ShardService.load`; a state is not replaced under a standby either."""
        if self._epoch or self._standby.is_seeded:
            raise LateLoad("a state is to replace one that a standby has, or is")
        super().load(state)

    def may_be_mapped(self) -> bool:
        """Not for a primary: it sends what it has to keep until its standby has it."""
        return not self._is_following and super().may_be_mapped()

    @property
    def _is_following(self) -> bool:
        return self._shard is None and self._standby.is_seeded

    def _loaded(self) -> Shard:
        if self._is_retired:
            raise Retired("another server has this one's place")
        return super()._loaded()

    # The primary's side.

    def _settle(self, operation: Operation) -> Any:
        arrived_s = self._clock()
        with self._turns:
            if self._is_alone:
                return self._perform_alone(operation, arrived_s)
            self._take_turn()
            shard = self._loaded()
            if not has_effect(shard, operation):
                self._end_turn()
                return self._perform(shard, operation, arrived_s)
            index, replica = self._num_logged, self._replica
            self._num_logged += 1
        try:
            echo = replica.take(index, operation) if replica else None
        except Superseded as error:
            self._retire(f"its standby refused an operation: {error}")
            raise Retired(str(error)) from error
        finally:
            with self._turns:
                self._end_turn()
                if replica is not None:
                    arrived_s = self._count_waiting(operation, arrived_s)
        return self._perform_in_turn(index, operation, arrived_s, replica, echo)

    def _count_waiting(self, operation: Operation, arrived_s: float) -> float:
        """Count what a push waited for the standby: to carry out it, and those before it.

        Returns when that was over; the lock is held.
        """
        now_s = self._clock()
        if isinstance(operation, Push):
            self._waited_s += now_s - arrived_s
        return now_s

    @property
    def _is_alone(self) -> bool:
        """Whether no standby is to have what comes next, and nothing that came before waits."""
        return self._replica is None and not (
            self._is_taken or self._num_claims or self._num_performed < self._num_logged
        )

    def _perform_alone(self, operation: Operation, arrived_s: float) -> Any:
        """As a service without replication does it. The lock is held: its turn is over at once."""
        shard = self._loaded()
        try:
            return self._perform(shard, operation, arrived_s)
        finally:
            self._num_logged = self._num_performed = self._num_performed + 1

    def _perform_in_turn(
        self,
        index: int,
        operation: Operation,
        arrived_s: float,
        replica: Replica | None,
        echo: Echo | None,
    ) -> Any:
        with self._turns:
            self._wait(lambda: self._num_performed == index)
            shard = self._loaded()
            version = shard.version
            try:
                result = self._perform(shard, operation, arrived_s)
            finally:
                self._num_performed += 1
                self._turns.notify_all()
            differs = echo is not None and self._differs(shard, version, result, echo)
        if replica is not None and differs:
            replica.fail(
                f"the standby differs at version {shard.version}: it can't take the primary's place"
            )
        return result

    def _differs(self, shard: Shard, version: int, result: Any, echo: Echo) -> bool:
        """Whether the standby made something else of the operation that led from a version on."""
        if isinstance(result, Receipt) and echo.receipt not in (None, result):
            return True
        return bool(echo.checksum) and echo.checksum != checksum_due(
            shard, version, self._check_every
        )

    def _take_turn(self) -> None:
        """The lock is held, but while this waits. Raises Busy, Retired, NotLoaded."""
        self._loaded()
        if not self._turns.wait_for(self._may_take_turn, MAX_TURN_WAIT_S):
            raise Busy("the operation before this one waits for the standby")
        self._loaded()
        self._is_taken = True

    def _may_take_turn(self) -> bool:
        return self._is_retired or not (self._is_taken or self._num_claims)

    def _end_turn(self) -> None:
        self._is_taken = False
        self._turns.notify_all()

    def _wait(self, until: Callable[[], bool]) -> None:
        """For operations that have had their turn to be carried out here."""
        self._turns.wait_for(lambda: self._is_retired or until(), ENDLESS_S)
        self._loaded()

    def attach(self, epoch: int, connect: Callable[[], Link]) -> None:
        """Seed a standby and keep it in step from then on; returns once it is.

        A repetition waits a while for the same one. Raises StandbyLost, OutOfTurn, Busy, Retired.
        """
        self.detach(epoch)
        with self._turns:
            self._take_turn()
            try:
                self._wait(lambda: self._num_performed == self._num_logged)
                if epoch != self._epoch:
                    raise OutOfTurn(f"epoch {epoch}, and {self._epoch} has begun")
                known = self._replica
                if known is None:
                    index, image = self._num_logged, self._loaded().image()
                    replica = Replica(epoch, connect(), self._turns, self._clock)
                    self._replica = replica
            finally:
                self._end_turn()
        if known is not None:
            self._join(known)
            return
        self._seed(replica, index, image)
        self._join(replica)

    def _seed(self, replica: Replica, index: int, image: Image) -> None:
        try:
            replica.seed(index, image)
            self._claim_turn(replica)
            try:
                replica.drain()
                replica.complete(self._num_logged)
            finally:
                with self._turns:
                    self._end_turn()
        except Superseded as error:
            self._retire(f"its standby refused an image: {error}")
            raise Retired(str(error)) from error

    def _claim_turn(self, replica: Replica) -> None:
        """Take the next turn, before all who wait; who has it may wait for room in the backlog."""
        with self._turns:
            self._num_claims += 1
        try:
            while True:
                replica.drain()
                with self._turns:
                    self._loaded()
                    if not self._is_taken:
                        self._is_taken = True
                        return
                    self._turns.wait_for(
                        lambda: not self._is_taken or replica.num_behind > 0, MAX_TURN_WAIT_S
                    )
        finally:
            with self._turns:
                self._num_claims -= 1

    def _join(self, replica: Replica) -> None:
        with self._turns:
            if not self._turns.wait_for(
                lambda: replica.state is not ReplicaState.SEEDING, MAX_TURN_WAIT_S
            ):
                raise Busy("the standby is being seeded")
        if replica.state is not ReplicaState.IN_STEP:
            raise StandbyLost(replica.error or "the standby was given up")

    def detach(self, epoch: int) -> None:
        """Go on without a standby, if this is a new epoch. Answers what waits for it."""
        with self._turns:
            if epoch <= self._epoch:
                return
            self._epoch, replica, self._replica = epoch, self._replica, None
        if replica is not None:
            replica.give_up()

    def retire(self, epoch: int) -> None:
        """Refuse all calls from now on. Raises OutOfTurn for an epoch of this server's own."""
        if epoch <= self._epoch:
            raise OutOfTurn(f"epoch {epoch} follows {self._epoch}")
        self._retire(f"it was told of epoch {epoch}")

    def _retire(self, why: str) -> None:
        with self._turns:
            if not self._is_retired:
                _log.warning("this server was replaced, and answers nothing any more: %s", why)
            self._is_retired = True
            replica = self._replica
            self._turns.notify_all()
            self._published.notify_all()
            self._captured.notify_all()
        if replica is not None:
            replica.give_up()

    def status(self) -> ShardStatus:
        """Clocks and counters, and how the standby is doing."""
        status, replica = super().status(), self._replica
        if replica is None and not self._is_paired:
            return status
        of_replica = (
            ReplicaStatus(self._epoch, "none")
            if replica is None
            else ReplicaStatus(
                self._epoch,
                replica.state.value,
                replica.num_behind,
                replica.waiting_s,
                replica.error,
            )
        )
        return replace(status, replica=replace(of_replica, waited_s=self._waited_s))

    # The standby's side.

    def seed(self, order: Order, image: Image) -> None:
        """See `Standby.seed`."""
        with self._lock:
            if self._shard is not None and not self._standby.is_seeded:
                raise OutOfTurn("this shard has a state of its own")
            self._standby.seed(order, image)

    def follow(self, order: Order, operation: Operation) -> Echo:
        """See `Standby.follow`."""
        with self._lock:
            return self._standby.follow(order, operation)

    def _follow(self, push: Push, order: Order) -> Receipt:
        echo = self.follow(order, push)
        if echo.receipt is None:
            raise OutOfTurn(f"push {push.sequence} of worker {push.worker} has no receipt")
        return replace(echo.receipt, checksum=echo.checksum)

    def complete(self, order: Order) -> None:
        """See `Standby.complete`."""
        with self._lock:
            self._standby.complete(order)

    def promote(self, epoch: int) -> int:
        """Be the primary from now on; returns the version. A repetition has no effect.

        Raises NotInStep, OutOfTurn.
        """
        with self._lock:
            if self._shard is None or epoch != self._epoch:
                self._shard, index = self._standby.promote(epoch)
                self._num_logged = self._num_performed = index
                self._epoch = epoch
            return self._shard.version
