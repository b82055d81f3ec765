"""What every lane does, whatever carries the bytes, and how a lane may fail.

The protocol's rules hold in all of them: a push is settled at most once and all or nothing, a pull
is one version, whole, and holds up no update.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

import grpc
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from model.settings import Settings
from ps.push import Push
from ps.shard import Receipt
from ps.snapshot import Pulled

LaneName = Literal["shm", "tcp", "grpc"]


class LaneError(RuntimeError):
    """The connection failed; what became of the call is unknown, and it is safe to repeat."""


class LaneUnavailable(LaneError):
    """This lane can't work between these two processes, though the shard answers."""


class NoSharedMemory(LaneUnavailable):
    """This process can't put a vector where another could map it, now or later."""


class NotAdmitted(LaneError):
    """The connection stood, and the shard did not take it in."""


class Refused(grpc.RpcError):
    """The shard refused a call, and no retry mends it.

    The same error in every lane, so that callers need not know which they use. Unlike gRPC's own it
    can be pickled: it may have to reach another process.
    """

    def __init__(self, status: grpc.StatusCode, reason: str) -> None:
        super().__init__(status, reason)
        self._status, self._reason = status, reason

    def __str__(self) -> str:
        return self._reason

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return self._reason


def _unheard() -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Wanted:
    """What a pull asks for; unless said otherwise, the newest version, as it is."""

    at_least: int = 0
    """The first version that will do."""
    worker: int | None = None
    """Who is to compute from it: the policy may let a worker wait. It is told what is in it."""
    wait_s: float = 0.0
    """How long the shard may take until both are so."""
    dtype: torch.dtype = torch.float32
    """What the parameters travel in."""
    filling: Callable[[], None] = field(default=_unheard, compare=False)
    """Called before anything is written to the vectors; until then they are as they were."""


NEWEST = Wanted()


class Lane(Protocol):
    """The calling half of a lane to one shard. Any thread may call; calls of one kind may queue."""

    @property
    def name(self) -> LaneName:
        """How settings and the log call it."""

    def pull(
        self,
        parameters: Tensor,
        statistics: Tensor,
        timeout_s: float,
        wanted: Wanted = NEWEST,
    ) -> Pulled | None:
        """Fill both float32 vectors with a version of the shard; returns which.

        Parameters that travel as bf16 arrive as what they were rounded to, to nearest, ties to
        even: the same numbers in every lane. None, and nothing is filled, if the shard doesn't
        come to what is wanted in time.
        Raises LaneError, StreamError or grpc.RpcError; the vectors' contents are then arbitrary.
        """

    def push(self, push: Push, timeout_s: float) -> Receipt:
        """Have a push settled. Its vectors must stay as they are until this returns.

        The gradient travels in its own dtype, float32 or bf16.
        Raises LaneError or grpc.RpcError; whether it was settled, the same push again tells. Until
        it does, the shard may still read the vectors.
        """

    def open(self, timeout_s: float) -> None:
        """Connect now rather than in the first call. Raises LaneError or grpc.RpcError."""

    def close(self) -> None:
        """End all calls under way, which then raise LaneError or grpc.RpcError."""


def _ordered(ports: tuple[int, int]) -> tuple[int, int]:
    if ports[0] > ports[1]:
        raise ValueError("the first port must not be greater than the last")
    return ports


Port = Annotated[int, Field(ge=1, le=65535)]


class LaneSettings(Settings):
    """How the bytes of vectors travel between workers and servers."""

    choice: Literal["auto", "shm", "tcp", "grpc"] = "auto"
    """shm: shared memory, where worker and server run on one host; tcp: a connection of its own
    beside the gRPC port, admitted by a one-time ticket, and in TLS where gRPC is; grpc: through the
    gRPC port alone. auto: the first of these that works, for each pair of worker and server."""
    port_range: Annotated[tuple[Port, Port], AfterValidator(_ordered)] | None = None
    """First and last port that servers may listen at, for firewalls; each server takes two (one
    with choice = "grpc"). Any free port if unset."""
