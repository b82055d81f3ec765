"""A standby: carries out the operations of its primary's log, in order, from an image on.

Like a shard it knows no network; its caller serialises all calls.
"""

from dataclasses import dataclass

from ps.image import Image
from ps.operations import Operation, perform
from ps.push import Order
from ps.receipts import ForgottenReceipt, Receipt
from ps.shard import Shard, ShardConfig
from ps.snapshot import Allocate

CHECK_EVERY = 1000
"""Updates from one checksum of all vectors to the next: it reads them all, as a cut does."""


class Superseded(RuntimeError):
    """A primary of an earlier epoch: another server has taken its place."""


class OutOfTurn(RuntimeError):
    """A call that doesn't follow from those before it; nothing was changed."""


class NotInStep(RuntimeError):
    """A standby that may lack what its primary has answered can't take its place."""


@dataclass(frozen=True)
class Echo:
    """What a standby answers: its receipt for a push, and its checksum where one is due, else 0."""

    receipt: Receipt | None = None
    checksum: int = 0


def checksum_due(shard: Shard, version_before: int, every: int) -> int:
    """The shard's checksum if it has just come to a version that is to be checked, else 0."""
    version = shard.version
    return shard.checksum() if version != version_before and version % every == 0 else 0


class Standby:
    """A shard that does what another one does."""

    def __init__(
        self, config: ShardConfig, allocate: Allocate | None = None, check_every: int = CHECK_EVERY
    ) -> None:
        self._config, self._allocate, self._check_every = config, allocate, check_every
        self._shard: Shard | None = None
        self._epoch = 0
        self._next_index = 0
        self._last = Echo()
        self._in_step = self._is_promoted = False

    @property
    def is_seeded(self) -> bool:
        """Whether it has a state."""
        return self._shard is not None

    def seed(self, order: Order, image: Image) -> None:
        """Begin anew with an image, which follow the operations from `order.index` on.

        A repetition has no effect. Raises Superseded.
        """
        self._check_epoch(order)
        if order.epoch == self._epoch:
            return
        self._shard = Shard.of_image(self._config, image, self._allocate)
        self._epoch, self._next_index, self._in_step = order.epoch, order.index, False

    def follow(self, order: Order, operation: Operation) -> Echo:
        """Carry out the next operation. Repeating the last one returns the first answer.

        Raises Superseded, OutOfTurn.
        """
        shard = self._followed(order)
        if order.index < self._next_index:
            return self._last
        if order.index > self._next_index:
            raise OutOfTurn(f"operation {order.index} instead of {self._next_index}")
        version = shard.version
        try:
            result = perform(shard, operation)
        except ForgottenReceipt:  # as at the primary, where it changes nothing either
            result = None
        receipt = result if isinstance(result, Receipt) else None
        self._last = Echo(receipt, checksum_due(shard, version, self._check_every))
        self._next_index += 1
        return self._last

    def complete(self, order: Order) -> None:
        """All that the primary has answered is here, and from now on it answers nothing else.

        Raises Superseded, OutOfTurn.
        """
        self._followed(order)
        if order.index > self._next_index:
            raise OutOfTurn(f"complete at {order.index}, and {self._next_index} is to come")
        self._in_step = True

    def promote(self, epoch: int) -> tuple[Shard, int]:
        """Stop following: the shard, and the number of operations that it has carried out.

        Raises NotInStep, OutOfTurn.
        """
        if self._shard is None or not self._in_step:
            raise NotInStep("the standby is not in step with its primary, and may lack updates")
        if epoch <= self._epoch:
            raise OutOfTurn(f"epoch {epoch} follows {self._epoch}")
        self._epoch, self._is_promoted = epoch, True
        return self._shard, self._next_index

    def _check_epoch(self, order: Order) -> None:
        if self._is_promoted or order.epoch < self._epoch:
            raise Superseded(f"epoch {order.epoch} is over: {self._epoch} has begun")

    def _followed(self, order: Order) -> Shard:
        self._check_epoch(order)
        if self._shard is None or order.epoch != self._epoch:
            raise OutOfTurn(f"no image of epoch {order.epoch} has come")
        return self._shard
