"""Settings: what a run does when processes die, or say nothing."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from model.settings import Settings


class FailureConfig(Settings):
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """How often the run starts again, from what is left or from its last checkpoint, after a
    server is lost, or any worker in allreduce mode; -1 for ever. In other modes workers are
    replaced without that, and without holding the others up."""
    salvage_s: NonNegativeFloat = 30.0
    """Seconds to gather what a lost server left: the state of the others, and its parameters as a
    worker holds them. Only its own newest updates are then lost; 0 goes back to the last
    checkpoint."""
    server_timeout_s: PositiveFloat = 60.0
    """With scaling.replicas = 1: a server that says nothing for so long, though Ray doesn't know
    of its death, is given up for its standby; and a standby that keeps its server waiting for so
    long is given up for another one. Must exceed what a push takes from server to standby."""
    max_worker_failures: Annotated[int, Field(ge=-1)] = 100
    """How many workers may be replaced in all; -1 for any number."""
    max_fruitless_failures: PositiveInt = 3
    """A worker that dies this often in a row without one push ends the run."""
    worker_timeout_s: PositiveFloat = 600.0
    """A worker that is not heard of for so long is killed and replaced, and one that takes longer
    for its process to start is not waited for; must exceed the longest step and the time that a
    worker takes to start. One that waits for a server, or there for other workers, is heard of."""
