"""When a push may be applied, and when a worker may go on: small validated policies.

What each costs, what is exact and where it comes from is in docs/consistency.md.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from model.settings import Settings
from ps.delayed_nesterov import DelayedNesterov
from ps.rules import SGD, Momentum, Rule

PULLS_UNDER_WAY = 2
"""Versions that a worker can have pulled and not yet answered with a push: it may pull ahead."""


_MODE = Field(
    description="""async: workers never wait for one another; bounded: the fastest waits for the
slowest when it is too far ahead; sync: gradients of one version are averaged; averaging: workers
train by themselves, and their parameters are averaged; elastic: workers train by themselves, drawn
to a common centre; allreduce: workers average each step's gradients among themselves, with torch's
DistributedDataParallel."""
)
"""Of `mode`, which is a setting of every policy."""


class _Policy(Settings):
    """What shards, workers and the supervisor ask of a policy; here, that of plain async SGD."""

    mode: str
    """Declared here so that it comes first among a policy's settings."""

    @property
    def waits(self) -> bool:
        """Whether a worker waits, after a push, for the version that follows it."""
        return False

    @property
    def needs_roster(self) -> bool:
        """Whether shards must be told who is at work (`Shard.expect`)."""
        return self.waits

    @property
    def max_lead(self) -> int | None:
        """Clocks that a worker may be ahead of the slowest at work; None for any number."""
        return None

    @property
    def compensation(self) -> float:
        """The weight of delay compensation; 0 for none."""
        return 0.0

    @property
    def in_rank_order(self) -> bool:
        """Whether gradients are summed in the order of their workers."""
        return False

    @property
    def batches_per_push(self) -> int | None:
        """Batches behind each push; None for all of a worker's."""
        return 1

    def kept_versions(self, num_workers: int) -> int:
        """Versions that a shard keeps besides the newest, those being read, and one to write."""
        kept = PULLS_UNDER_WAY * num_workers if self.compensation else 0
        return kept + (self.max_lead == 0)

    def num_sums(self, num_workers: int) -> int:
        """Vectors as long as a gradient in which a shard gathers pushes."""
        return 1 if self.waits else 0

    def workers_at(self, epoch: float, num_workers: int) -> int:
        """How many workers are to be at work when this many epochs are done."""
        return num_workers

    def pushes_per_update(self, num_workers: int) -> int:
        """Pushes that make one version."""
        return 1

    def admits(self, staleness: int) -> bool:
        """Whether a push of this staleness (in versions) is to be applied."""
        return True

    def server_rule(self, optimizer: Rule, num_workers: int | None = None) -> Rule:
        """The servers' optimizer. Delayed momentum needs to know the number of workers."""
        return optimizer

    def server_lr(self, lr: float, num_workers: int, staleness: int = 0) -> float:
        """The servers' learning rate, where the schedule's is `lr`."""
        return lr


class _EachByItself(_Policy):
    """Every push is an update of its own, computed from parameters that have moved since."""

    staleness_lr: bool = False
    """Divide the learning rate of a push by its staleness, where that exceeds 1 (Zhang et al.
    2016, arXiv 1511.05950). With momentum the whole step shrinks, not the gradient's part alone."""
    delay_compensation: PositiveFloat | None = None
    """lambda of DC-ASGD (Zheng et al. 2017, arXiv 1609.08326): each gradient g becomes
    g + lambda g g (theta now - theta as pulled). A server then keeps what workers pulled: up to two
    more copies of its parameters for each of them."""

    @property
    def compensation(self) -> float:
        """The weight of delay compensation; 0 for none."""
        return self.delay_compensation or 0.0

    def server_lr(self, lr: float, num_workers: int, staleness: int = 0) -> float:
        """The servers' learning rate, where the schedule's is `lr`."""
        return lr / max(1, staleness) if self.staleness_lr else lr


class Async(_EachByItself):
    """Asynchronous SGD: every push is applied as it arrives (Chen et al. 2016, Algorithm 2)."""

    mode: Annotated[Literal["async"], _MODE] = "async"
    max_staleness: NonNegativeInt | None = None
    """Drop, and count, pushes staler than this many versions; none applies them all."""
    ramp_up_epochs: NonNegativeFloat = 0.0
    """Begin with one worker and add the others evenly over this many epochs, so that staleness
    rises slowly (Chen et al. 2016: high staleness from the first step on may not train)."""

    @model_validator(mode="after")
    def _has_something_to_mend(self) -> Self:
        if self.max_staleness == 0:
            for name in ("staleness_lr", "delay_compensation"):
                if getattr(self, name):
                    raise ValueError(
                        f"consistency.{name} = {getattr(self, name)} has no effect with "
                        "consistency.max_staleness = 0, which applies fresh gradients alone: "
                        f"remove {name}, or raise max_staleness"
                    )
        return self

    def admits(self, staleness: int) -> bool:
        """Whether a push of this staleness (in versions) is to be applied."""
        return self.max_staleness is None or staleness <= self.max_staleness

    def workers_at(self, epoch: float, num_workers: int) -> int:
        """How many workers are to be at work when this many epochs are done."""
        if epoch >= self.ramp_up_epochs:
            return num_workers
        return 1 + math.floor((num_workers - 1) * epoch / self.ramp_up_epochs)


class Bounded(_EachByItself):
    """Stale synchronous parallel (Ho et al. 2013): a worker's clock counts its pushes.

    One that has settled c pushes may begin another once every worker at work has settled c - s. As
    in async mode, each push is applied as it arrives, at the schedule's learning rate; BN deltas
    likewise. With s = 0 all compute from the same version, the one that all earlier clocks made:
    with SGD, equal batches and a learning rate divided by the number of workers this is sync mode.
    """

    mode: Annotated[Literal["bounded"], _MODE] = "bounded"
    slack: NonNegativeInt = 3
    """s: pushes that a worker may be ahead of the slowest one at work when it begins another; 0 is
    bulk-synchronous. The dead and those who are done are not waited for."""

    @property
    def needs_roster(self) -> bool:
        """Whether shards must be told who is at work (`Shard.expect`)."""
        return True

    @property
    def max_lead(self) -> int | None:
        """Clocks that a worker may be ahead of the slowest at work; None for any number."""
        return self.slack


class Sync(_Policy):
    """Synchronous SGD with backup workers (Chen et al. 2016, Algorithms 3 and 4).

    A shard averages the first N gradients of its version, each weighed by its samples, and drops
    the b that come later: N + b = `scaling.num_workers`.
    """

    mode: Annotated[Literal["sync"], _MODE] = "sync"
    backup_workers: NonNegativeInt = 0
    """Workers whose gradients need not be waited for; the latest ones are dropped and counted."""
    deterministic: bool = False
    """Sum gradients in the order of their workers rather than of their arrival, so that the same
    gradients make the same bits in every run. A server then holds up to one gradient a worker."""

    @model_validator(mode="after")
    def _sums_the_same_ones(self) -> Self:
        if self.deterministic and self.backup_workers:
            raise ValueError(
                f"consistency.deterministic = true with consistency.backup_workers = "
                f"{self.backup_workers}: whose gradients are summed would still depend on who is "
                "quicker; set backup_workers to 0, or deterministic to false"
            )
        return self

    @property
    def waits(self) -> bool:
        """Whether a worker waits, after a push, for the version that follows it."""
        return True

    @property
    def in_rank_order(self) -> bool:
        """Whether gradients are summed in the order of their workers."""
        return self.deterministic

    def num_sums(self, num_workers: int) -> int:
        """Vectors as long as a gradient in which a shard gathers pushes."""
        return num_workers if self.deterministic else 1

    def pushes_per_update(self, num_workers: int) -> int:
        """Pushes that make one version."""
        return num_workers - self.backup_workers

    def admits(self, staleness: int) -> bool:
        """Whether a push of this staleness (in versions) is to be applied."""
        return staleness == 0


class Averaging(_Policy):
    """Workers train by themselves; the servers average their parameters and BN statistics.

    Once, at the end of all data, this is SimuParallelSGD (Zinkevich et al. 2010); every H steps it
    is local SGD, and with an outer momentum DiLoCo (arXiv 2311.08105). `optimizer` and `schedule`
    are then each worker's own; the servers take averaged differences of parameters for a gradient.
    """

    mode: Annotated[Literal["averaging"], _MODE] = "averaging"
    local_steps: PositiveInt | None = None
    """Batches that a worker trains on between two averages; none: all of its share, so that there
    is one average, at the end. A worker that dies loses what it has not pushed."""
    outer_lr: PositiveFloat = 1.0
    """Learning rate of the servers; 1 makes the parameters the average."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Nesterov momentum of the servers over the averaged differences. With `asynchronous` it is
    delayed (arXiv 2401.09135): it joins in at every N-th push of N workers, with their mean."""
    asynchronous: bool = False
    """Apply each worker's difference as it comes, divided by the number of workers."""

    @model_validator(mode="after")
    def _has_more_than_one_average(self) -> Self:
        if self.asynchronous and self.outer_momentum and self.local_steps is None:
            raise ValueError(
                f"consistency.outer_momentum = {self.outer_momentum} with consistency.asynchronous "
                "= true and one push of each worker, at its end: there are no later pushes for the "
                "momentum to act on; set consistency.local_steps, or outer_momentum to 0"
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

    @property
    def _delays_momentum(self) -> bool:
        return self.asynchronous and self.outer_momentum > 0

    def server_rule(self, optimizer: Rule, num_workers: int | None = None) -> Rule:
        """The servers' optimizer. Delayed momentum needs to know the number of workers."""
        if self._delays_momentum:
            assert num_workers is not None, "the momentum's period is the number of workers"
            return DelayedNesterov(momentum=self.outer_momentum, nesterov=True, every=num_workers)
        if self.outer_momentum:
            return Momentum(momentum=self.outer_momentum, nesterov=True)
        return SGD()

    def server_lr(self, lr: float, num_workers: int, staleness: int = 0) -> float:
        """The servers' learning rate, where the schedule's is `lr`."""
        if self.asynchronous and not self._delays_momentum:
            return self.outer_lr / num_workers
        return self.outer_lr  # DelayedNesterov divides by itself


class Elastic(_Policy):
    """Elastic averaging (EASGD, Zhang et al. 2015, arXiv 1412.6651), asynchronously.

    Workers train by themselves, with `optimizer` and `schedule` as their own; with momentum this is
    EAMSGD. The servers hold the centre. Every tau steps a worker pulls it, moves towards it by
    e = alpha (its own - the centre), and pushes e, by which the centre moves; BN statistics
    likewise.
    """

    mode: Annotated[Literal["elastic"], _MODE] = "elastic"
    local_steps: PositiveInt = 10
    """tau: batches that a worker trains on before it meets the centre again."""
    moving_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """alpha: the share of the way to the centre. Workers that push at one time move the centre by
    alpha times their number: that product must be less than 1. none: 0.9 of one worker's part."""

    def rate(self, num_workers: int) -> float:
        """alpha."""
        return self.moving_rate or 0.9 / num_workers

    @property
    def batches_per_push(self) -> int | None:
        """Batches behind each push; None for all of a worker's."""
        return self.local_steps

    def server_rule(self, optimizer: Rule, num_workers: int | None = None) -> Rule:
        """The servers' optimizer. Delayed momentum needs to know the number of workers."""
        return SGD()

    def server_lr(self, lr: float, num_workers: int, staleness: int = 0) -> float:
        """The servers' learning rate, where the schedule's is `lr`."""
        return 1.0


class AllReduce(_Policy):
    """Workers average their gradients among themselves, with torch's DistributedDataParallel.

    Each has the optimizer and a whole copy of the state, which stays the same everywhere. The
    servers take no part in it: they hold what was last published, for evaluations and checkpoints.
    """

    mode: Annotated[Literal["allreduce"], _MODE] = "allreduce"
    publish_every_s: PositiveFloat = 10.0
    """Seconds between two states that the first worker sends to the servers, from where checkpoints
    are taken. It also sends one at every evaluation's samples, and at the end."""
    timeout_s: PositiveFloat = 600.0
    """A step for which some worker lets the others wait longer fails: the run then starts again
    from its last checkpoint. Must exceed the longest step of the slowest worker."""
    bucket_mb: PositiveFloat = 25.0
    """Gradients of so many 2^20 bytes are averaged together, while backpropagation goes on."""
    find_unused_parameters: bool = False
    """For models of which a forward pass leaves out some parameters; costs time at each step."""

    def pushes_per_update(self, num_workers: int) -> int:
        """Gradients that make one version."""
        return num_workers

    def admits(self, staleness: int) -> bool:
        """Whether a push is to be applied: none is, of whatever staleness."""
        return False


def _with_mode(settings: Any) -> Any:
    """What is given without a mode is for the default one."""
    return {"mode": "async", **settings} if isinstance(settings, dict) else settings


Policy = Annotated[
    Async | Bounded | Sync | Averaging | Elastic | AllReduce,
    Field(discriminator="mode"),
    BeforeValidator(_with_mode),
]
