"""How many servers a run needs, and what it asks of the network, from a step's time.

The constants are what `benchmarks/transport.py` and `update.py` measured on two cores of an AMD
EPYC over tcp (docs/transport.md, docs/update.md); other processors differ. `tests/unit/
test_sizing.py` holds the formulas against the recorded rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from asynception.plan import BYTES_PER_ELEMENT, ModelPlan
from model.errors import InputError

UPDATE_S_PER_BYTE = 0.23e-9
"""Of a shard's parameters: the look for NaN and Inf, and a fused update with EMA."""
SERVER_S_PER_BYTE = 0.18e-9
"""Processor seconds of a server for each byte pulled or pushed, the update not counted."""
WORKER_S_PER_BYTE = 0.16e-9
"""The same of a worker."""
LANE_BYTES_PER_S = 5e9
"""Of one worker that has server and network to itself."""

TLS_S_PER_BYTE = 0.6e-9
"""More at either end where what moves is encrypted (`benchmarks/tls.py`, docs/security.md)."""
TLS_BYTES_PER_S = 1.1e9
"""A worker's then, to one server: each of its connections has one thread at either end."""

SERVER_CORES = 2.0
"""Where `scaling.resources_per_server` doesn't say."""
MAX_LOAD = 0.7
"""Share of what servers can do that is planned with: pushes come unevenly."""


@dataclass(frozen=True)
class Traffic:
    """What the workers of a run do to its servers."""

    pushes_per_s: float
    """Of all workers together; each goes to all shards."""
    pull_num_bytes: int
    push_num_bytes: int
    update_s: float
    """Processor seconds of one push's update, all shards together."""
    step_s: float
    """Seconds of a gradient, its pull and its push, in one worker."""
    tls: bool = False
    """Whether what moves is encrypted."""

    def num_servers(self, cores: float, network_bytes_per_s: float) -> int:
        """How many servers keep up, each with so many cores and such a network (each way)."""
        return max(
            1, math.ceil(self.pushes_per_s / (MAX_LOAD * self.limit(cores, network_bytes_per_s)))
        )

    def limit(self, cores: float, network_bytes_per_s: float) -> float:
        """Pushes/s that one server could take if it held all parameters."""
        by_network = network_bytes_per_s / max(self.pull_num_bytes, self.push_num_bytes)
        return min(cores / self.server_cpu_s, 1 / self.update_s, by_network)

    @property
    def server_cpu_s(self) -> float:
        """Processor seconds that one pull, push and update take at the servers."""
        return self._moving_s(SERVER_S_PER_BYTE) + self.update_s

    @property
    def worker_cpu_s(self) -> float:
        """Processor seconds that one pull and push take at a worker, beside the gradient."""
        return self._moving_s(WORKER_S_PER_BYTE)

    def _moving_s(self, s_per_byte: float) -> float:
        """Processor seconds at one end of one pull and push."""
        of_tls = TLS_S_PER_BYTE if self.tls else 0.0
        return (s_per_byte + of_tls) * (self.pull_num_bytes + self.push_num_bytes)


def traffic(
    pull_num_bytes: int,
    push_num_bytes: int,
    update_s: float,
    gradient_s: float,
    num_workers: int,
    network_bytes_per_s: float,
    *,
    overlap: bool = False,
    tls: bool = False,
) -> Traffic:
    """Of workers that take `gradient_s` for what they push, and move it at their network's pace."""
    rate = min(TLS_BYTES_PER_S if tls else LANE_BYTES_PER_S, network_bytes_per_s)
    move_s = (pull_num_bytes + push_num_bytes) / rate
    step_s = max(gradient_s, move_s) if overlap else gradient_s + move_s
    pushes_per_s = num_workers / step_s
    return Traffic(pushes_per_s, pull_num_bytes, push_num_bytes, update_s, step_s, tls)


def plan_traffic(plan: ModelPlan, compute_s: float, network_bytes_per_s: float) -> Traffic:
    """compute_s: seconds of one batch's gradient in one worker.

    Raises InputError for modes in which workers don't push gradients.
    """
    config = plan.config
    batches = config.batches_per_push
    if config.reduces or batches is None:
        raise InputError(
            f'--step-s with consistency.mode = "{config.consistency.mode}": its workers push too '
            "seldom for servers to matter; leave it out"
        )
    return traffic(
        plan.pull_num_bytes,
        plan.push_num_bytes,
        UPDATE_S_PER_BYTE * BYTES_PER_ELEMENT * plan.layout.num_parameters,
        batches * compute_s,
        config.scaling.max_workers,
        network_bytes_per_s,
        overlap=config.pipeline.overlap,
        tls=config.security.tls != "off",
    )


def describe_traffic(
    plan: ModelPlan, compute_s: float, network_gbit: float
) -> Iterator[tuple[str, str]]:
    """(what, how much), line by line. Raises InputError."""
    network = network_gbit * 1e9 / 8
    of_all = plan_traffic(plan, compute_s, network)
    num_servers = plan.config.scaling.num_servers
    cores = plan.config.scaling.resources_per_server.get("CPU", 0) or SERVER_CORES
    batches = plan.config.batches_per_push or 1
    samples = batches * plan.config.data.batch_size * of_all.pushes_per_s
    yield "pushes", f"{of_all.pushes_per_s:.1f}/s of all workers, {samples:,.0f} samples/s"
    yield (
        "a worker's pulls and pushes",
        f"{1 - batches * compute_s / of_all.step_s:.0%} of its time",
    )
    sent = of_all.push_num_bytes * of_all.pushes_per_s * 8e-9
    workers = plan.config.scaling.max_workers
    yield (
        "network",
        (f"{sent / workers:.2f} Gbit/s from each worker, {sent / num_servers:.2f} to each server"),
    )
    yield "servers' processors", f"{of_all.server_cpu_s * of_all.pushes_per_s:.2f} cores in all"
    needed = of_all.num_servers(cores, network)
    yield (
        "servers needed",
        f"{needed}, with {cores:g} cores and {network_gbit:g} Gbit/s each; there are {num_servers}",
    )
