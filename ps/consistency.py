"""When a push may be applied: small validated policies."""

from typing import Literal

from pydantic import NonNegativeInt

from model.settings import Settings


class Async(Settings):
    """Asynchronous SGD: every push is applied as it arrives (Chen et al. 2016, Algorithm 2)."""

    mode: Literal["async"] = "async"
    """Workers never wait for one another."""
    max_staleness: NonNegativeInt | None = None
    """Drop, and count, pushes staler than this many versions; none applies them all."""

    def admits(self, staleness: int) -> bool:
        """Whether a push of this staleness (in versions) is to be applied."""
        return self.max_staleness is None or staleness <= self.max_staleness
