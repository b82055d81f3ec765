"""When a push may be applied: small validated policies."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt

from model.settings import Settings


class Async(Settings):
    """Asynchronous SGD: every push is applied as it arrives (Chen et al. 2016, Algorithm 2)."""

    mode: Literal["async"] = "async"
    """async: workers never wait for one another; sync: gradients of one version are averaged."""
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


class Sync(Settings):
    """Synchronous SGD with backup workers (Chen et al. 2016, Algorithms 3 and 4).

    A shard averages the first N gradients of its version, each weighed by its samples, and drops
    the b that come later: N + b = `scaling.num_workers`.
    """

    mode: Literal["sync"] = "sync"
    """async: workers never wait for one another; sync: gradients of one version are averaged."""
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


def _with_mode(settings: Any) -> Any:
    """What is given without a mode is for the default one."""
    return {"mode": "async", **settings} if isinstance(settings, dict) else settings


Policy = Annotated[Async | Sync, Field(discriminator="mode"), BeforeValidator(_with_mode)]
