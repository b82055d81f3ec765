"""The cells of one lane: its processes, its limits, and what is measured of them in a round."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from measured_rows import Cell, Measured, Ratio, Round, Row, measure, over, over_limits, row_of
from shard_processes import (
    Served,
    Shards,
    cpu_s_of,
    peak_mb_of,
    shards,
    vectors_num_bytes,
)
from transport_limits import LIMIT_OF, LimitName, MemoryLimits, limit_servers
from worker_processes import Loop, Open, OpenLane, OpenLimit, Workers, workers

from ps.lanes.lane import LaneName, LaneSettings

DROPPED_FROM = 1_000
"""Workers of this number and more push what is dropped."""

WARM_UP_S = 0.1
"""A round before those that count; every worker makes one update at least."""

MEMCPY = Cell("memcpy")

Job = Callable[[], Measured | None]


def update_cell(rule: str) -> Cell:
    """The fused update alone."""
    return Cell("fused update", rule)


@dataclass(frozen=True)
class Plan:
    """What is measured of every lane."""

    workers: Sequence[int]
    shards: Sequence[int]
    works: Sequence[str]
    """Of "momentum", "sgd" (one shard, for peers) and "bytes" (pushes that are dropped)."""
    seconds: float
    """How long workers loop for one figure."""
    rounds: int


@dataclass(frozen=True)
class _Target:
    """Workers and the server processes that they loop over, which say what they do."""

    workers: Workers
    processes: Sequence[Served]
    num_bytes: int
    shards: Shards | None = None

    def cpu_s(self) -> float:
        return sum(cpu_s_of(served.pid) for served in self.processes)

    def apply_s(self) -> list[float]:
        return self.shards.apply_s() if self.shards else [0.0]


@dataclass
class LaneCells:
    """Jobs of one lane by cell, to be run while `lane_cells` holds their processes."""

    lane: LaneName
    plan: Plan
    limits: MemoryLimits
    jobs: dict[Cell, Job] = field(default_factory=dict)
    ratios: dict[Cell, dict[str, Ratio]] = field(default_factory=dict)
    groups: dict[int, Shards] = field(default_factory=dict)
    """Those that apply momentum, by number of shards."""
    seconds: float = 0.0
    """How long workers loop now."""

    def add(self, cell: Cell, target: _Target) -> None:
        """Measure workers that loop over the exchange named after `cell`."""
        name = exchange_name(cell)
        self.jobs[cell] = lambda: self._run(name, cell.workers, target)

    def _run(self, name: str, num_workers: int, target: _Target) -> Measured:
        cpu_s, apply_s = target.cpu_s(), target.apply_s()
        loops = target.workers.run(name, num_workers, self.seconds)
        num_updates = sum(each.num_updates for each in loops)
        shard_s = max(
            (after - before) / num_updates
            for before, after in zip(apply_s, target.apply_s(), strict=True)
        )
        cpu_s = target.cpu_s() - cpu_s
        peak_mb = sum(peak_mb_of(served.pid) for served in target.processes)
        return figures(loops, target.num_bytes, shard_s, cpu_s, peak_mb)

    def rounds(self, peers: Mapping[Cell, Job]) -> list[Row]:
        """Measure everything, peers included, and make rows of it."""
        self.seconds = WARM_UP_S
        memory = {cell: job() for cell, job in self.jobs.items()}  # touches all memory, too
        self.seconds = self.plan.seconds
        rounds = measure({**self.jobs, **peers}, self.plan.rounds)
        return [self._row(cell, rounds, memory) for cell in (*self.jobs, *peers)]

    def _row(
        self, cell: Cell, rounds: Sequence[Round], memory: Mapping[Cell, Measured | None]
    ) -> Row:
        row = row_of(cell, rounds, self.ratios.get(cell, {}))
        for name in ("server_peak_mb", "worker_peak_mb"):
            first = memory.get(cell)
            if first and name in first:  # later, larger cells have used the same processes
                row[name] = round(first[name])
                row.pop(f"{name}_quartiles", None)
        return {**row, "lane": self.lane}


def exchange_name(cell: Cell) -> str:
    """How workers know it: the same whatever their number."""
    return f"{cell.what}, {cell.work}, {cell.shards}"


def figures(
    loops: Sequence[Loop], num_bytes: int, shard_s: float, cpu_s: float, peak_mb: float
) -> Measured:
    """Of workers that looped at once.

    num_bytes: of a pull, and of a push. shard_s: of one push, at the shard; it moves no bytes.
    cpu_s, peak_mb: of the servers.
    """
    updates_per_s = sum(each.num_updates / each.elapsed_s for each in loops)
    pull_s = statistics.mean(each.pull_s for each in loops)
    push_s = statistics.mean(each.push_s for each in loops)
    moved_gb = 2 * num_bytes * sum(each.num_updates for each in loops) / 1e9
    return {
        "updates_per_s": updates_per_s,
        "gbps": 2 * num_bytes * updates_per_s / 1e9,
        "cycle_ms": 1e3 / updates_per_s,
        "pull_ms": 1e3 * pull_s,
        "push_ms": 1e3 * push_s,
        "shard_ms": 1e3 * shard_s,
        "pull_gbps": num_bytes / pull_s / 1e9,
        "push_gbps": num_bytes / (push_s - shard_s) / 1e9,
        "moved_gbps": len(loops) * 2 * num_bytes / (pull_s + push_s - shard_s) / 1e9,
        "server_cpu_s_per_gb": cpu_s / moved_gb,
        "worker_cpu_s_per_gb": sum(each.cpu_s for each in loops) / moved_gb,
        "server_peak_mb": peak_mb,
        "worker_peak_mb": max(each.peak_mb for each in loops),
    }


@contextmanager
def lane_cells(lane: LaneName, plan: Plan, limits: MemoryLimits) -> Iterator[LaneCells]:
    """Start a lane's servers and workers, and the servers of its limit."""
    with ExitStack() as stack:
        cells = LaneCells(lane, plan, limits)
        _add_memory(cells)
        momentum = [work for work in ("momentum", "bytes") if work in plan.works]
        for num_shards in plan.shards if momentum else ():
            cells.groups[num_shards] = _add_group(stack, cells, num_shards, "momentum", momentum)
        if "sgd" in plan.works and lane != "grpc":
            _add_group(stack, cells, 1, "sgd", ["sgd"])
        yield cells


def _add_memory(cells: LaneCells) -> None:
    limits = cells.limits
    cells.jobs[MEMCPY] = limits.memcpy
    cells.jobs[update_cell("momentum")] = lambda: limits.update("momentum")
    if "sgd" in cells.plan.works:
        cells.jobs[update_cell("sgd")] = lambda: limits.update("sgd")


def _add_group(
    stack: ExitStack, cells: LaneCells, num_shards: int, rule: str, works: Sequence[str]
) -> Shards:
    """Servers of one model, and workers of their own, so that peaks are theirs alone."""
    most, settings = max(cells.plan.workers), LaneSettings(choice=cells.lane)
    # Each worker has a second client, for pushes that are dropped.
    group = stack.enter_context(shards(num_shards, rule, settings, 2 * most))
    limit = LIMIT_OF.get(cells.lane) if "bytes" in works else None
    beside = stack.enter_context(limit_servers(limit, group.layout, most)) if limit else None
    running = stack.enter_context(workers(most, group.layout))  # ends first
    if rule in works:
        _add_cycles(cells, group, running)
    if limit and beside:
        _add_bytes(cells, group, running, limit, *beside)
    return group


def _add_cycles(cells: LaneCells, group: Shards, running: Workers) -> None:
    settings, rule = LaneSettings(choice=cells.lane), group.rule
    first = Cell(cells.lane, rule, 1, len(group.processes))
    running.open(exchange_name(first), OpenLane(group.addresses, group.layout, settings))
    target = _Target(running, group.processes, vectors_num_bytes(group.layout), group)
    for num_workers in sorted(cells.plan.workers):
        cell = replace(first, workers=num_workers)
        cells.add(cell, target)
        limits = (MEMCPY, update_cell(rule))
        cells.ratios[cell] = {"x_limit": over_limits(cell, "cycle_ms", limits)}


def _add_bytes(
    cells: LaneCells,
    group: Shards,
    running: Workers,
    name: LimitName,
    limit: OpenLimit,
    processes: Sequence[Served],
) -> None:
    settings, layout = LaneSettings(choice=cells.lane), group.layout
    dropped = OpenLane(group.addresses, layout, settings, True, DROPPED_FROM)
    num_bytes = vectors_num_bytes(layout)
    targets: dict[str, tuple[Open, _Target]] = {
        cells.lane: (dropped, _Target(running, group.processes, num_bytes, group)),
        name: (limit, _Target(running, processes, 4 * layout.num_parameters)),
    }
    num_shards = len(group.processes)
    for what, (opened, target) in targets.items():
        running.open(exchange_name(Cell(what, "bytes", 1, num_shards)), opened)
        for num_workers in sorted(cells.plan.workers):
            cells.add(Cell(what, "bytes", num_workers, num_shards), target)
    for num_workers in cells.plan.workers:
        cell, base = (Cell(what, "bytes", num_workers, num_shards) for what in targets)
        cells.ratios[cell] = _byte_ratios(cell, base)


def _byte_ratios(cell: Cell, base: Cell) -> dict[str, Ratio]:
    """Among several workers a pull meets others' pulls and pushes as they come, so that only what
    all of them move together can be compared."""
    if cell.workers > 1:
        return {"x_moved": over(cell, base, "moved_gbps")}
    return {f"x_{way}": over(cell, base, f"{way}_gbps") for way in ("pull", "push", "moved")}


def balance_row(lane: LaneName, group: Shards, num_workers: int) -> Row:
    """Bytes that each shard has been pushed by all workers together."""
    pushes = [sum(status.pushes.values()) for status in group.control.describe()]
    pairs = zip(pushes, group.layout.shards, strict=True)
    pushed = [4 * count * ranges.numel for count, ranges in pairs]
    return {
        "what": "balance",
        "lane": lane,
        "workers": num_workers,
        "shards": len(pushed),
        "pushed_gb": [round(num_bytes / 1e9, 4) for num_bytes in pushed],
        "x_smallest": max(pushed) / min(pushed),
    }
