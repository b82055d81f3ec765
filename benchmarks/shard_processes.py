"""Server processes for benchmarks: Xception's 22.9 M parameters cut into shards, one each."""

import multiprocessing as mp
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from model.flat import parameter_segments, statistic_segments
from model.registry import create_model
from ps.client import ModelState, ParameterClient, RetryPolicy
from ps.consistency import Async
from ps.lanes.lane import LaneSettings
from ps.layout import Layout, plan_layout
from ps.malloc import tune_malloc
from ps.rules import SGD, Ema, Momentum, RMSprop, Rule, warm_up
from ps.schedule import Clocks, Constant, Horizon
from ps.server import ShardServer
from ps.service import ShardService
from ps.state import ShardConfig, initial_state
from ps.tls import Identity

RULES: dict[str, Rule] = {
    "sgd": SGD(),
    "momentum": Momentum(weight_decay=1e-5),
    "rmsprop": RMSprop(weight_decay=1e-5),
}
TOKEN = "benchmark"
HOST = "127.0.0.1"

MAX_STALENESS = 1_000_000
START = Clocks(updates=10 * MAX_STALENESS)
"""Shards begin here, so that a push which claims to follow version 0 is dropped as too stale: all
of its bytes have moved and were checked, and nothing was updated."""

CONTEXT = mp.get_context("forkserver")
"""Processes start from one that has imported this module, which takes 20 ms instead of 3 s."""
CONTEXT.set_forkserver_preload(["shard_processes", "ps.server", "ps.client", "ps.kernels"])


def xception_layout(num_shards: int) -> Layout:
    """Xception with 1,000 classes, cut into shards."""
    with torch.device("meta"):
        module = create_model("xception", 1000)
    return plan_layout(parameter_segments(module), statistic_segments(module), num_shards)


def vectors_num_bytes(layout: Layout) -> int:
    """What one pull, or one push, moves."""
    return 4 * (layout.num_parameters + layout.num_statistics)


def shard_config(layout: Layout, shard: int, rule: str) -> ShardConfig:
    """A shard that applies all pushes but those that claim to follow version 0."""
    horizon = Horizon(epoch_samples=1_281_167, num_workers=1)
    policy = Async(max_staleness=MAX_STALENESS)
    schedule = Constant(lr=1e-6)
    return ShardConfig(layout.shards[shard], RULES[rule], schedule, horizon, Ema(), policy)


def serve(
    config: ShardConfig,
    host: str,
    num_workers: int,
    lanes: LaneSettings,
    identity: Identity | None = None,
) -> ShardServer:
    """A running server in this process."""
    torch.set_num_threads(1)
    tune_malloc()
    warm_up(config.rule, (torch.float32, torch.bfloat16))
    server = ShardServer(ShardService(config), host, TOKEN, num_workers, lanes, identity)
    server.start()
    return server


def load_zeros(client: ParameterClient, rule: str) -> None:
    """Give the shards a state at `START`."""
    layout = client.layout
    vectors = (torch.zeros(layout.num_parameters), torch.zeros(layout.num_statistics))
    state = initial_state(RULES[rule], *vectors)
    client.load(ModelState(START, state.vectors, {}))


def peak_mb() -> float:
    """This process's largest resident set, shared memory included, in 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def peak_mb_of(pid: int) -> float:
    """The same of another process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / 1e6


def cpu_s_of(pid: int) -> float:
    """Processor seconds that a process of this user has taken, as clock_getcpuclockid(3) does."""
    return time.clock_gettime((~pid << 3) | 2)


@dataclass(frozen=True)
class Served:
    """One process, which ends when its pipe is written to or closed."""

    process: mp.process.BaseProcess
    pipe: Connection

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self.process.pid is not None
        return self.process.pid


@dataclass(frozen=True)
class Shards:
    """Running server processes that hold one model, and a client for control calls."""

    rule: str
    layout: Layout
    addresses: Sequence[str]
    processes: Sequence[Served]

    @cached_property
    def control(self) -> ParameterClient:
        """Control calls go by gRPC whatever the lane."""
        return ParameterClient(self.addresses, self.layout, TOKEN, RetryPolicy())

    def apply_s(self) -> list[float]:
        """Seconds that each shard has spent on pushes: checks, and updates where it made one."""
        return [status.apply_s for status in self.control.describe()]

    def updates(self) -> list[int]:
        """Updates that each shard has made since `START`."""
        return [status.clocks.updates - START.updates for status in self.control.describe()]


@contextmanager
def running(processes: Sequence[Served]) -> Iterator[None]:
    """End the processes behind the block."""
    try:
        yield
    finally:
        for served in processes:
            served.pipe.close()
        for served in processes:
            served.process.join(10)
            if served.process.is_alive():
                served.process.kill()


@contextmanager
def shards(num_shards: int, rule: str, lanes: LaneSettings, num_workers: int) -> Iterator[Shards]:
    """Server processes on loopback, loaded."""
    layout = xception_layout(num_shards)
    processes = [
        start_process(_serve, layout, shard, rule, num_workers, lanes)
        for shard in range(num_shards)
    ]
    with running(processes):
        addresses = [served.pipe.recv() for served in processes]
        group = Shards(rule, layout, addresses, processes)
        load_zeros(group.control, rule)
        yield group
        group.control.close()


def start_process(target: object, *args: object) -> Served:
    """Start `target(*args, pipe)` in a process of its own."""
    near, far = CONTEXT.Pipe()
    process = CONTEXT.Process(target=target, args=(*args, far), daemon=True)  # type: ignore[arg-type]
    process.start()
    far.close()
    return Served(process, near)


def _serve(
    layout: Layout, shard: int, rule: str, num_workers: int, lanes: LaneSettings, pipe: Connection
) -> None:
    server = serve(shard_config(layout, shard, rule), HOST, num_workers, lanes)
    pipe.send(server.address)
    wait_for_end(pipe)
    server.stop()


def wait_for_end(pipe: Connection) -> None:
    """Returns when the parent closes its end, or has gone."""
    try:
        pipe.recv()
    except EOFError:
        return
