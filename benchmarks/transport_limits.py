"""What no lane can beat, measured between its rounds: one thread's memory, plain sockets, gRPC."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from bare_grpc import GrpcExchange, serve_grpc
from measured_rows import Measured
from plain_sockets import SocketExchange, serve_sockets
from shard_processes import HOST, RULES, START, Served, running, start_process
from worker_processes import OpenLimit

from ps.lanes.lane import LaneName
from ps.layout import Layout
from ps.rules import Ema, apply_rule, plan_blocks, warm_up

LimitName = Literal["plain sockets", "bare gRPC"]

LIMIT_OF: dict[LaneName, LimitName] = {"tcp": "plain sockets", "grpc": "bare gRPC"}
"""Lanes whose bytes go through the kernel, and what moves as many with nothing around it."""


class MemoryLimits:
    """A memcpy of the parameters, and the fused update alone, in this process, on one thread."""

    def __init__(self, layout: Layout) -> None:
        """layout: of one shard."""
        (shard,) = layout.shards
        numel = shard.parameters.numel
        self._blocks = plan_blocks(numel, shard.decayed)
        self._theta, self._out, self._gradient, self._ema, *self._slots = (
            torch.zeros(numel).fill_(1e-6) for _ in range(6)
        )
        for rule in RULES.values():
            warm_up(rule)

    def memcpy(self) -> Measured:
        """One copy of the parameters."""
        start_s = time.perf_counter()
        self._out.copy_(self._theta)
        return self._since(start_s)

    def update(self, name: str) -> Measured:
        """One update with the EMA, without the check for NaN and Inf that a shard makes first."""
        rule = RULES[name]
        slots = self._slots[: len(rule.slots)]
        vectors = (self._blocks, self._theta, self._out, self._gradient, slots, self._ema)
        start_s = time.perf_counter()
        apply_rule(rule, *vectors, 1e-6, Ema().decay, START.updates, 1)
        return self._since(start_s)

    def _since(self, start_s: float) -> Measured:
        seconds = time.perf_counter() - start_s
        num_bytes = self._theta.numel() * self._theta.element_size()
        return {"cycle_ms": 1e3 * seconds, "gbps": num_bytes / seconds / 1e9}


@contextmanager
def limit_servers(
    name: LimitName, layout: Layout, num_workers: int
) -> Iterator[tuple[OpenLimit, list[Served]]]:
    """One process for each shard of the layout, and how workers reach them."""
    with ExitStack() as stack:
        processes = [
            _start(name, 4 * shard.parameters.numel, num_workers) for shard in layout.shards
        ]
        stack.enter_context(running(processes))
        addresses = [(HOST, int(served.pipe.recv())) for served in processes]
        kind = SocketExchange if name == "plain sockets" else GrpcExchange
        yield OpenLimit(kind, addresses, layout), processes


def _start(name: LimitName, num_bytes: int, num_workers: int) -> Served:
    if name == "plain sockets":
        return start_process(serve_sockets, num_bytes, HOST)
    return start_process(serve_grpc, num_bytes, HOST, num_workers)
