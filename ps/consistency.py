"""When a push may be applied: small validated policies."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from model.settings import Settings
from ps.rules import SGD, Momentum, Rule


class Async(Settings):
    """Asynchronous SGD: every push is applied as it arrives (Chen et al. 2016, Algorithm 2)."""

    mode: Literal["async"] = "async"
    """async: workers never wait for one another; sync: gradients of one version are averaged;
    averaging: workers train by themselves, and their parameters are averaged."""
    max_staleness: NonNegativeInt | None = None
    """Drop, and count, pushes staler than this many versions; none applies them all."""

    @property
    def waits(self) -> bool:
        """Whether a worker waits, after a push, for the version that follows it."""
        return False

    def pushes_per_update(self, num_workers: int) -> int:
        """Gradients that make one version."""
        return 1

    def admits(self, staleness: int) -> bool:
        """Whether a push of this staleness (in versions) is to be applied."""
        return self.max_staleness is None or staleness <= self.max_staleness

    @property
    def batches_per_push(self) -> int | None:
        """Batches behind each push; None for all of a worker's."""
        return 1

    def server_rule(self, optimizer: Rule) -> Rule:
        """The servers' optimizer."""
        return optimizer

    def server_lr(self, lr: float, num_workers: int) -> float:
        """The servers' learning rate, where the schedule's is `lr`."""
        return lr


class Sync(Settings):
    """Synchronous SGD with backup workers (Chen et al. 2016, Algorithms 3 and 4).

    A shard averages the first N gradients of its version, each weighed by its samples, and drops
    the b that come later: N + b = `scaling.num_workers`.
    """

    mode: Literal["sync"] = "sync"
    """async: workers never wait for one another; sync: gradients of one version are averaged;
    averaging: workers train by themselves, and their parameters are averaged."""
    backup_workers: NonNegativeInt = 0
    """Workers whose gradients need not be waited for; the latest ones are dropped and counted."""

    @property
    def waits(self) -> bool:
        """Whether a worker waits, after a push, for the version that follows it."""
        return True

    def pushes_per_update(self, num_workers: int) -> int:
        """Gradients that make one version."""
        return num_workers - self.backup_workers

    def admits(self, staleness: int) -> bool:
        """Whether a push of this staleness (in versions) is to be applied."""
        return staleness == 0

    @property
    def batches_per_push(self) -> int | None:
        """Batches behind each push; None for all of a worker's."""
        return 1

    def server_rule(self, optimizer: Rule) -> Rule:
        """The servers' optimizer."""
        return optimizer

    def server_lr(self, lr: float, num_workers: int) -> float:
        """The servers' learning rate, where the schedule's is `lr`."""
        return lr


class Averaging(Settings):
    """Workers train by themselves; the servers average their parameters and BN statistics.

    Once, at the end of all data, this is SimuParallelSGD (Zinkevich et al. 2010); every H steps it
    is local SGD, and with an outer momentum DiLoCo (arXiv 2311.08105). `optimizer` and `schedule`
    are then each worker's own; the servers take averaged differences of parameters for a gradient.
    """

    mode: Literal["averaging"] = "averaging"
    """async: workers never wait for one another; sync: gradients of one version are averaged;
    averaging: workers train by themselves, and their parameters are averaged."""
    local_steps: PositiveInt | None = None
    """Batches that a worker trains on between two averages; none: all of its share, so that there
    is one average, at the end. A worker that dies loses what it has not pushed."""
    outer_lr: PositiveFloat = 1.0
    """Learning rate of the servers; 1 makes the parameters the average."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Nesterov momentum of the servers over the averaged differences."""
    asynchronous: bool = False
    """Apply each worker's difference as it comes, divided by the number of workers."""

    @model_validator(mode="after")
    def _momentum_is_of_fresh_differences(self) -> Self:
        if self.asynchronous and self.outer_momentum:
            raise ValueError(
                f"consistency.outer_momentum = {self.outer_momentum} over stale differences is "
                "what makes asynchronous averaging diverge (arXiv 2401.09135): set it to 0, or "
                "consistency.asynchronous to false"
            )
        return self

    @property
    def waits(self) -> bool:
        """Whether a worker waits, after a push, for the version that follows it."""
        return not self.asynchronous

    @property
    def batches_per_push(self) -> int | None:
        """Batches behind each push; None for all of a worker's."""
        return self.local_steps

    def pushes_per_update(self, num_workers: int) -> int:
        """Pushes that make one version."""
        return 1 if self.asynchronous else num_workers

    def admits(self, staleness: int) -> bool:
        """Whether a push of this staleness (in versions) is to be applied."""
        return self.asynchronous or staleness == 0

    def server_rule(self, optimizer: Rule) -> Rule:
        """The servers' optimizer."""
        if self.outer_momentum:
            return Momentum(momentum=self.outer_momentum, nesterov=True)
        return SGD()

    def server_lr(self, lr: float, num_workers: int) -> float:
        """The servers' learning rate, where the schedule's is `lr`."""
        return self.outer_lr / num_workers if self.asynchronous else self.outer_lr


def _with_mode(settings: Any) -> Any:
    """What is given without a mode is for the default one."""
    return {"mode": "async", **settings} if isinstance(settings, dict) else settings


Policy = Annotated[
    Async | Sync | Averaging, Field(discriminator="mode"), BeforeValidator(_with_mode)
]
