"""The coordinator at JFT's scale: 100,000 shards of 3,500 samples, 1,000 workers, one process.

"None may stop training" in figures: 1,000 workers with steps of 0.5 s make 2,000 steps/s. Each
worker reports 4 steps at a time, which is 500 reports/s; with batches of 32, leases of a shuffle
window come to about 4 a second, and leases of 8 batches to 250. The trainer asks for the progress
twice a second, and for a position of the data at each checkpoint, once a minute. Calls come one at
a time, so what counts is the share of one core that all of them take together, which must be well
below 1, and the longest call, during which the others wait: workers hold a lease more than they
work on, and push to the servers without asking the coordinator, so they stop only if a call takes
longer than a lease lasts (4 s for 8 batches).

Workers are plain counters, on a clock of their own, and do what the worker loop and the loader do:
they differ in speed, hold two leases, and 1 % of the leases end with the death of their holder at
a random step, after which the newest push is at some servers only in half of the cases. A round is
the time between two checkpoints. Rounds are timed at the start of a run, and again after
`--num-steps` steps, which pass quickly, with few reports. There the run is restored from its
checkpoint's JSON, which must give the same number of consumed samples, and goes on for as many
rounds.

Times are CPU time of the process, as medians over the rounds with the quartiles (a report's and a
lease's are means within a round), so that a busy machine changes little. `unpickle_report` and
`pickle_progress` are what an actor pays besides for one of each; Ray's own work isn't counted.
Memory is the growth of the resident set since the imports, and what tracemalloc counts for a copy
of the ledger, its order of the present epoch included. Each kind of lease has a process of its own.
Prints one line `RESULT {json}` for each kind and stage.
"""

import json
import multiprocessing
import os
import pickle
import random
import statistics
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import click

from asynception.coordinator import Coordinator
from asynception.ledger import START, BatchLeases, LeaseEnd, Ledger, Position, WindowLeases
from asynception.totals import Totals
from ps.receipts import Settled
from ps.shard import Outcome, Receipt
from worker.data.order import EpochOrder
from worker.step_report import GradientSummary, StepReport

KINDS = ("window", "batches")
STEP_S = 0.5
STEPS_PER_REPORT = 4
LEASE_BATCHES = 8
LEASES_HELD = 2
DEATHS_PER_LEASE = 0.01


@dataclass(frozen=True)
class Scale:
    """What is simulated."""

    num_shards: int
    shard_samples: int
    num_workers: int
    num_servers: int
    batch_size: int
    shuffle_window: int
    progress_every_s: float
    checkpoint_every_s: float
    num_steps: int
    num_rounds: int

    @property
    def reports_per_s(self) -> float:
        return self.num_workers / (STEP_S * STEPS_PER_REPORT)

    @property
    def reports_per_round(self) -> int:
        return round(self.reports_per_s * self.checkpoint_every_s)


class Timings:
    """CPU seconds of one round, by what took them."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start_s = time.process_time()
        yield
        self.seconds[name].append(time.process_time() - start_s)


@dataclass
class _Worker:
    """A place in the run: its present life."""

    incarnation: int
    sequence: int = -1
    """Of the newest push."""
    lease_ends: list[int] = field(default_factory=list)
    """Batches of the life at which each lease that it holds ends."""
    num_leased: int = 0
    dies_at: int | None = None
    """Batches after which it ends."""


class Run:
    """A run's coordinator with its workers."""

    def __init__(self, scale: Scale, lease_end: LeaseEnd, order: EpochOrder) -> None:
        self.scale, self.lease_end, self.order = scale, lease_end, order
        self.now_s = 0.0
        self.random = random.Random(0)
        self.num_deaths = 0
        self._receipts = _receipts(self.random, scale)
        speeds = [self.random.uniform(0.7, 1.3) for _ in range(scale.num_workers)]
        self._speeds = list(accumulate(speeds))
        self.begin(START, Totals())

    def begin(self, position: Position, totals: Totals) -> None:
        """Start all workers where the data are at `position`."""
        total = 10 * self.order.num_samples
        self.ledger = Ledger(total, self.scale.batch_size, self.lease_end, position)
        self.control = Coordinator(self.ledger, totals, lambda: self.now_s)
        self.workers = [
            _Worker(self.control.enlist(each)) for each in range(self.scale.num_workers)
        ]
        self.settled: dict[int, dict[int, int]] = {}
        """As the servers know it: by worker and incarnation, the newest push."""

    def round(self, timings: Timings) -> str:
        """From one checkpoint to the next; returns the latter's JSON."""
        per_s = self.scale.reports_per_s
        due = every = round(per_s * self.scale.progress_every_s)
        for worker in self._turns(self.scale.reports_per_round):
            self.now_s += 1 / per_s
            self._advance(worker, timings)
            due -= 1
            if not due:
                due = every
                with timings.measure("progress"):
                    self.control.progress()
        return self.checkpoint(timings)

    def _turns(self, num_reports: int) -> list[int]:
        """Whose turn it is to report."""
        numbers = range(len(self.workers))
        return self.random.choices(numbers, cum_weights=self._speeds, k=num_reports)

    def skip(self, num_steps: int) -> None:
        """Pass steps quickly: many to a report, which says of the last one alone."""
        per_round = self.scale.reports_per_round * STEPS_PER_REPORT
        passed = 0
        while passed < num_steps:
            until = passed + per_round
            while passed < until:
                for worker in self._turns(len(self.workers)):
                    passed += self._advance(worker, Timings(), 16 * STEPS_PER_REPORT, thin=True)
            self.checkpoint(Timings())

    def checkpoint(self, timings: Timings) -> str:
        """What a checkpoint holds of the coordinator, and the longest call that it takes."""
        with timings.measure("position"):
            position = self.control.position(self.settled)
        totals = self.control.progress().totals
        with timings.measure("checkpoint_json"):
            return json.dumps({"position": position.to_json(), "totals": totals.to_json()})

    def _advance(
        self, number: int, timings: Timings, num_steps: int = STEPS_PER_REPORT, thin: bool = False
    ) -> int:
        """The next few steps of a worker: leases, pushes, one report. Returns how many."""
        worker = self.workers[number]
        while worker.lease_ends and worker.lease_ends[0] <= worker.sequence + 1:
            worker.lease_ends.pop(0)
        while len(worker.lease_ends) < LEASES_HELD:
            self._lease(number, worker, timings)
        before = worker.sequence
        steps = self.steps(worker, num_steps, thin)
        self.settled.setdefault(number, {})[worker.incarnation] = worker.sequence
        if worker.dies_at is not None and worker.sequence + 1 >= worker.dies_at:
            self._die(number, worker, timings)
        else:
            with timings.measure("report"):
                self.control.report(number, worker.incarnation, steps)
        return worker.sequence - before

    def _lease(self, number: int, worker: _Worker, timings: Timings) -> None:
        with timings.measure("lease"):
            lease = self.control.lease(number, worker.incarnation)
        assert lease is not None, "the run is longer than the benchmark"
        if worker.dies_at is None and self.random.random() < DEATHS_PER_LEASE:
            num_batches = lease.num_batches(self.scale.batch_size)
            worker.dies_at = worker.num_leased + self.random.randint(1, num_batches)
        worker.num_leased += lease.num_batches(self.scale.batch_size)
        worker.lease_ends.append(worker.num_leased)

    def steps(self, worker: _Worker, num_steps: int, thin: bool = False) -> list[StepReport]:
        """As many as fit into a report, a life and the leases that it holds."""
        limit = worker.num_leased if worker.dies_at is None else worker.dies_at
        first = worker.sequence + 1
        stop = min(first + num_steps, limit)
        worker.sequence = max(worker.sequence, stop - 1)
        size = self.scale.batch_size
        summary, times_s = GradientSummary(4.0, 1.0), (0.01, 0.04, 0.4, 0.05)
        return [
            StepReport(each, size, (), summary, self.random.choice(self._receipts), *times_s)
            for each in range(stop - 1 if thin else first, stop)
        ]

    def _die(self, number: int, worker: _Worker, timings: Timings) -> None:
        """Its last pushes are never reported, and the newest one is not everywhere."""
        self.num_deaths += 1
        partial = self.random.random() < 0.5
        settled = Settled(worker.sequence - partial, worker.sequence)
        self.settled[number][worker.incarnation] = settled.everywhere
        with timings.measure("end"):
            self.control.end(number, settled)
        self.workers[number] = _Worker(self.control.enlist(number))


def _receipts(source: random.Random, scale: Scale) -> list[tuple[Receipt, ...]]:
    """Of some pushes: a push is as many versions late as there were others since its pull."""
    late = [round(source.gammavariate(8, scale.num_workers / 8)) for _ in range(100_000)]
    receipts = [Receipt(Outcome.APPLIED, each, each, 0.001) for each in late]
    size = scale.num_servers
    return [tuple(receipts[i : i + size]) for i in range(0, len(receipts) - size, size)]


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _traced_bytes(ledger: Ledger, position: int) -> int:
    """What a copy of the ledger takes, after it has been asked for a lease."""
    content = pickle.dumps(ledger)
    tracemalloc.start()
    copied: Ledger = pickle.loads(content)
    copied._lease_end(position)
    num_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return num_bytes


def _cpu_s(call: Callable[[], Any]) -> float:
    start_s = time.process_time()
    call()
    return time.process_time() - start_s


def _summary(values: list[float]) -> dict[str, float]:
    """In microseconds."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median_us": median * 1e6, "quartile1_us": first * 1e6, "quartile3_us": third * 1e6}


class Stage:
    """Some rounds at one point of a run."""

    def __init__(self, run: Run, name: str, before_bytes: int) -> None:
        self._run, self._name, self._before_bytes = run, name, before_bytes
        self.checkpoint = ""
        """The newest one's JSON."""

    def measure(self) -> dict[str, Any]:
        rounds = []
        for _ in range(self._run.scale.num_rounds):
            timings = Timings()
            self.checkpoint = self._run.round(timings)
            rounds.append(timings)
        names = ("report", "lease", "end", "progress", "position", "checkpoint_json")
        times = {n: [statistics.mean(r.seconds[n]) for r in rounds if r.seconds[n]] for n in names}
        times["progress_at_end"] = [each.seconds["progress"][-1] for each in rounds]
        times |= self._pickling()
        result = {n: _summary(seconds) for n, seconds in times.items() if len(seconds) > 1}
        longest = max(s for r in rounds for each in r.seconds.values() for s in each)
        return result | self._shares(result, rounds) | self._sizes() | {"longest_call_s": longest}

    def _pickling(self) -> dict[str, list[float]]:
        run = self._run
        worker = _Worker(0, num_leased=STEPS_PER_REPORT)
        report = pickle.dumps((0, 0, run.steps(worker, STEPS_PER_REPORT)))
        progress = run.control.progress()
        rounds = range(max(5, run.scale.num_rounds))
        return {
            "unpickle_report": [_cpu_s(lambda: pickle.loads(report)) for _ in rounds],
            "pickle_progress": [_cpu_s(lambda: pickle.dumps(progress)) for _ in rounds],
        }

    def _shares(self, result: Mapping[str, Any], rounds: list[Timings]) -> dict[str, Any]:
        """Of one core, at the rates of the docstring."""
        scale = self._run.scale
        num_leases = statistics.mean(len(each.seconds["lease"]) for each in rounds)
        per_s = {
            "report": scale.reports_per_s,
            "lease": num_leases / scale.checkpoint_every_s,
            "progress": 1 / scale.progress_every_s,
            "position": 1 / scale.checkpoint_every_s,
        }
        own = {n: rate * result[n]["median_us"] / 1e6 for n, rate in per_s.items() if n in result}
        pickling = per_s["report"] * result["unpickle_report"]["median_us"]
        pickling += per_s["progress"] * result["pickle_progress"]["median_us"]
        return {
            "reports_per_core_s": 1e6 / result["report"]["median_us"],
            "leases_per_s": per_s["lease"],
            "core_share": own,
            "core_share_total": sum(own.values()),
            "core_share_with_pickling": sum(own.values()) + pickling / 1e6,
        }

    def _sizes(self) -> dict[str, Any]:
        run = self._run
        position = json.dumps(json.loads(self.checkpoint)["position"])
        return {
            "stage": self._name,
            "deaths": run.num_deaths,
            "consumed_share_of_epoch": run.control.progress().num_consumed / run.order.num_samples,
            "open_ranges": len(json.loads(position)["open"]),
            "position_json_bytes": len(position),
            "checkpoint_json_bytes": len(self.checkpoint),
            "ledger_traced_mb": _traced_bytes(run.ledger, json.loads(position)["frontier"]) / 1e6,
            "rss_growth_mb": (_rss_bytes() - self._before_bytes) / 1e6,
        }


def _restore(run: Run, checkpoint: str, num_rounds: int) -> dict[str, Any]:
    """Start anew from a checkpoint, and check that nothing was lost or gained."""
    consumed = run.control.position(run.settled).num_consumed
    seconds = []
    for _ in range(max(2, num_rounds)):
        start_s = time.process_time()
        values = json.loads(checkpoint)
        position = Position.from_json(values["position"])
        totals = Totals.from_json(values["totals"])
        run.begin(position, totals)
        seconds.append(time.process_time() - start_s)
        assert run.control.progress().num_consumed == consumed == position.num_consumed
    return {"stage": "restore", **_summary(seconds)}


def _benchmark(kind: str, scale: Scale) -> None:
    before_bytes = _rss_bytes()
    sizes = [scale.shard_samples] * scale.num_shards
    order = EpochOrder(sizes, seed=0, shuffle_window=scale.shuffle_window)
    by_batches = BatchLeases(scale.batch_size, LEASE_BATCHES)
    lease_end: LeaseEnd = WindowLeases(order) if kind == "window" else by_batches
    first_s = [
        _cpu_s(lambda: EpochOrder(sizes, 0, scale.shuffle_window).window_end(0)) for _ in range(5)
    ]
    run = Run(scale, lease_end, order)
    order.window_end(0)
    _print(kind, {"stage": "order of an epoch", **_summary(first_s)})
    _print(kind, Stage(run, "start", before_bytes).measure())
    run.skip(scale.num_steps)
    middle = Stage(run, f"after {scale.num_steps} steps", before_bytes)
    _print(kind, middle.measure())
    _print(kind, _restore(run, middle.checkpoint, scale.num_rounds))
    _print(kind, Stage(run, "restored", before_bytes).measure())


def _print(kind: str, result: Mapping[str, Any]) -> None:
    text = json.dumps({"leases": kind, **result})
    rounded = json.loads(text, parse_float=lambda number: float(f"{float(number):.4g}"))
    print("RESULT " + json.dumps(rounded), flush=True)


@click.command()
@click.option("--leases", multiple=True, type=click.Choice(KINDS), default=KINDS)
@click.option("--num-shards", default=100_000, show_default=True)
@click.option("--shard-samples", default=3_500, show_default=True)
@click.option("--num-workers", default=1_000, show_default=True)
@click.option("--num-servers", default=8, show_default=True, help="Receipts of each push.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--shuffle-window", default=16_384, show_default=True)
@click.option("--progress-every-s", default=0.5, show_default=True)
@click.option("--checkpoint-every-s", default=60.0, show_default=True)
@click.option("--num-steps", default=3_000_000, show_default=True, help="Before the second stage.")
@click.option("--num-rounds", default=5, show_default=True, help="Of each stage.")
def main(leases: tuple[str, ...], **scale: Any) -> None:
    """Time the coordinator's calls at the scale of JFT."""
    spawning = multiprocessing.get_context("spawn")
    for kind in leases:
        process = spawning.Process(target=_benchmark, args=(kind, Scale(**scale)))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
