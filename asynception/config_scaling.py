"""The section of the config tree that says how many there are of what: [scaling]."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from model.settings import Settings


def _counts(value: Any) -> Any:
    """A number of workers, or the ends of a range, which the command line may give as MIN,MAX."""
    parts = value.split(",") if isinstance(value, str) else value
    ends = list(parts) if isinstance(parts, list | tuple) else [parts]
    try:
        counts = [int(end) for end in ends if not isinstance(end, bool | float)]
    except (TypeError, ValueError):
        counts = []
    if len(counts) != len(ends) or not 1 <= len(counts) <= 2:
        raise ValueError(
            f"scaling.num_workers = {value!r}: give a number of workers, or the least and the most "
            "as [2, 6]"
        )
    if counts[0] < 1 or counts[-1] < counts[0]:
        raise ValueError(
            f"scaling.num_workers = {spelled(value)}: nobody would train with less than one "
            "worker, and a range begins with its least: give 1 or more, or [MIN, MAX]"
        )
    return counts[0] if len(counts) == 1 else (counts[0], counts[1])


def spelled(counts: Any) -> str:
    """As in a recipe."""
    return str(list(counts)) if isinstance(counts, tuple) else str(counts)


class ScalingConfig(Settings):
    """Ray Train's names, and servers beside workers."""

    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_counts)] = 2
    """Workers, each with its own copy of the model. [MIN, MAX] (or MIN,MAX) starts with MIN, takes
    more as there is room for them, and goes on with those that are left when nodes go: in async,
    bounded and elastic mode."""
    processes_per_worker: PositiveInt = 1
    """Processes of each worker, all on one node: as many as the node has GPUs. Each computes on
    batches of its own, and all send one gradient, and pull once, together: over NCCL on GPUs, gloo
    on CPUs. A push then holds so many times training.accumulate_grad_batches."""
    num_servers: PositiveInt = 1
    """Shards of the parameters, each with its own server."""
    replicas: Literal[0, 1] = 0
    """1: each server has a standby, on another node if there is one, which has all that the server
    has answered, and goes on in its place. Costs as much memory again, and each push travels once
    more. 0: a lost server's newest updates may be lost (failure.salvage_s)."""
    use_gpu: bool = False
    """Give each process of each worker a GPU."""
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] = Field(default={})
    """Ray resources of each worker, of all its processes together: each gets an equal share, whole
    above 1. One CPU (and one GPU with use_gpu) for each process unless given."""
    resources_per_server: dict[str, Annotated[float, Field(ge=0)]] = Field(default={})
    """Ray resources of each server, besides the memory that it needs."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places workers and servers over nodes."""
    spread_servers: bool = True
    """Place several servers on as many nodes as there are, whatever PACK would do."""
    slow_workers: dict[NonNegativeInt, Annotated[float, Field(ge=1)]] = Field(default={})
    """For experiments: how many times as long each of these workers takes for a gradient, such as
    1 = 20 for worker 1 (the first is 0). It sleeps for the rest of that time."""

    @property
    def is_range(self) -> bool:
        """Whether workers join and leave as there is room for them."""
        return isinstance(self.num_workers, tuple)

    @property
    def min_workers(self) -> int:
        """Without so many, a run doesn't start."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def max_workers(self) -> int:
        """There are never more; servers are planned for so many."""
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def worker_resources(self) -> dict[str, float]:
        """What each worker asks of Ray."""
        num_processes = float(self.processes_per_worker)
        default = {"CPU": num_processes, **({"GPU": num_processes} if self.use_gpu else {})}
        return {**default, **self.resources_per_worker}

    @property
    def process_resources(self) -> dict[str, float]:
        """What each process of a worker gets of that; Ray gives whole numbers above 1."""
        shares = {k: v / self.processes_per_worker for k, v in self.worker_resources.items()}
        return {k: float(math.floor(v)) if v > 1 else v for k, v in shares.items()}

    @model_validator(mode="after")
    def _each_process_has_a_gpu(self) -> Self:
        gpus, num_processes = self.worker_resources.get("GPU", 0), self.processes_per_worker
        if self.use_gpu and num_processes > 1 and (gpus < num_processes or gpus % num_processes):
            raise ValueError(
                f"scaling.resources_per_worker.GPU = {gpus:g} can't be shared evenly by "
                f"scaling.processes_per_worker = {num_processes}, and NCCL takes one process a "
                f"GPU: set it to {num_processes}, or the processes to {max(1, int(gpus))}"
            )
        return self

    @model_validator(mode="after")
    def _slow_ones_exist(self) -> Self:
        for worker in self.slow_workers:
            if worker >= self.max_workers:
                raise ValueError(
                    f"scaling.slow_workers names worker {worker}, and with scaling.num_workers = "
                    f"{spelled(self.num_workers)} the last one is {self.max_workers - 1}: name one "
                    "of them"
                )
        return self

    @model_validator(mode="after")
    def _each_worker_finds_its_own_room(self) -> Self:
        if self.is_range and self.placement_strategy.startswith("STRICT"):
            raise ValueError(
                f"scaling.placement_strategy = {self.placement_strategy} can't hold for workers "
                f"that come later, as with scaling.num_workers = {spelled(self.num_workers)}: "
                "choose PACK or SPREAD, or give one number of workers"
            )
        return self
