"""The run's processes: the real ones, watched, with a model that is two vectors of numbers."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from asynception.actors import WorkerProcess
from asynception.coordinator import Coordinator
from asynception.evaluator_actor import EvaluatorProcess
from asynception.journal import Call, Journal, JournaledCoordinator
from asynception.ledger import Ledger, Position
from asynception.simulate.scenario import Scenario, segments
from asynception.simulate.shard_watch import Life, ShardWatch
from asynception.simulate.waiting import Condition
from asynception.simulate.watch import Watch
from asynception.simulate.world import Party, World, current
from asynception.totals import Progress, Totals
from ps.operations import Enter, Expect, Fence, Operation
from ps.push import Push
from ps.receipts import Settled
from ps.service import ShardService
from ps.shard import Receipt, Shard, ShardConfig, ShardState
from ps.shard_client import ShardClient
from ps.snapshot import Pulled, Snapshot
from worker.data.labels import LabelLists
from worker.data.lease import Lease
from worker.data.loader import Batch
from worker.step_report import GradientSummary


class Told:
    """The watch is told of an operation that a shard carries out."""

    def __init__(self, watch: ShardWatch, run_watch: Watch, operation: Operation) -> None:
        """Before it is carried out, which uses the vectors of a push up."""
        self._watch, self._run_watch, self._operation = watch, run_watch, operation
        if isinstance(operation, Push):
            self._value = operation.gradient[0].item()
            self._delta = operation.statistics_delta[0].item()

    def done(self, shard: Shard, result: Any) -> None:
        """What the shard said."""
        watch, address, newest = self._watch, self._watch.address, shard._snapshots.newest
        match self._operation:
            case Push() as push:
                name = f"{address} push {push.worker}.{push.incarnation}.{push.sequence}"
                if result is not None:
                    current().note(f"{name}: {result.outcome.value}, {result.version}")
                    watch.settle(push, self._value, self._delta, result)
            case Expect(workers, number):
                is_late = number <= watch.num_expected
                current().note(f"{address} expect {sorted(workers)}{', late' * is_late}")
                if not is_late:
                    watch.num_expected = number
                    watch.expect(workers, newest.version)
            case Enter(worker, incarnation, clock):
                watch.pace.enter(worker, incarnation, clock)
            case Fence(worker, incarnation):
                current().note(f"{address} fence {worker}.{incarnation}: {dict(result)}")
                watch.pace.fence(worker, incarnation)
        watch.check_newest(newest)
        if isinstance(self._operation, Push):
            self._run_watch.waits.check(self._run_watch.shards)


class WatchedService(ShardService):
    """A shard whose every change is checked; threads wait in virtual time."""

    def __init__(
        self,
        config: ShardConfig,
        watch: ShardWatch,
        run_watch: Watch,
        world: World,
        **more: Any,
    ) -> None:
        super().__init__(config, world.clock, torch.empty, **more)
        self._watch, self._run_watch = watch, run_watch
        self._captured = cast(Any, Condition(self._lock))
        self._published = cast(Any, Condition(self._lock))

    def load(self, state: ShardState) -> None:
        super().load(state)
        self._watch.load(state)

    def _perform(self, shard: Shard, operation: Operation, arrived_s: float) -> Any:
        """Every operation of the one shard that there is, is one of the watch's."""
        told = Told(self._watch, self._run_watch, operation)
        result = super()._perform(shard, operation, arrived_s)
        told.done(shard, result)
        return result

    @contextmanager
    def pinned(self, worker: int | None = None) -> Iterator[Snapshot]:
        if worker is not None:
            self._watch.pace.begin(worker)
        with super().pinned(worker) as snapshot:
            version = snapshot.version
            yield snapshot
            if snapshot.version == version:
                self._watch.check_version(version, snapshot.parameters, snapshot.statistics)


class WatchedClient(ShardClient):
    """Calls to a shard, whose answers are checked."""

    watch: Watch
    read_states: dict[str, ShardState]
    """By address, what the session read last."""

    @property
    def _shard(self) -> ShardWatch | None:
        """None for a shard of a session that is over."""
        return self.watch.at(self.address)

    def pull(
        self,
        parameters: Tensor,
        statistics: Tensor,
        at_least: int = 0,
        worker: int | None = None,
        filling: Callable[[], None] | None = None,
    ) -> Pulled:
        waits, party = self.watch.waits, current().party
        address = self._shard.address if self._shard is not None else self.address
        waiting = (
            nullcontext() if worker is None else waits.waiting(party, worker, address, at_least)
        )
        with waiting:
            waits.check(self.watch.shards)
            pulled = super().pull(parameters, statistics, at_least, worker, filling)
        if self._shard is not None:
            self._shard.check_version(pulled.version, parameters, statistics)
        return pulled

    def push(self, push: Push) -> Receipt:
        if self._shard is not None:
            self._shard.send(push)
        receipt = super().push(push)
        if self._shard is not None:
            self._shard.acknowledged(push, receipt)
        return receipt

    def read(self, name: str, into: Callable[[str, int], Tensor]) -> ShardState:
        state = super().read(name, into)
        if name == "checkpoint" and self._shard is not None:
            self.read_states[self._shard.address] = state
        return state


class MemoryJournal(Journal):
    """A journal without a disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._state: Mapping[str, Any] | None = None
        self._calls: list[Call] = []

    def create(self) -> None:
        """There is nothing in it yet."""

    def remove(self) -> None:
        """Nobody asks for it again."""

    def read(self) -> tuple[Mapping[str, Any] | None, list[Call]]:
        return self._state, list(self._calls)

    def begin(self, state: Mapping[str, Any]) -> None:
        self._state, self._calls = state, []

    def append(self, call: Call) -> None:
        self._calls.append(copy.deepcopy(call))


class WatchedCoordinator(JournaledCoordinator):
    """The coordinator, with copies of what it is given, as in a process of its own."""

    def __init__(
        self,
        party: Party,
        watch: Watch,
        world: World,
        ledger: Ledger,
        totals: Totals,
        journal: Journal,
    ) -> None:
        super().__init__(copy.deepcopy(ledger), copy.deepcopy(totals), journal, world.clock)
        self._watch = watch
        world.note(f"{party.name} begins, after {self.num_deaths} deaths")

    def end(
        self, worker: int, settled: Settled | None = None, incarnation: int | None = None
    ) -> int:
        current().note(f"end {worker}.{incarnation}: {settled}")
        if settled is not None and incarnation is not None and worker in self._alive:
            self._watch.bury(worker, incarnation, settled)
        return super().end(worker, settled, incarnation)

    def at_cut(
        self,
        everywhere: Mapping[int, Mapping[int, int]],
        somewhere: Mapping[int, Mapping[int, int]],
    ) -> tuple[Position, Progress]:
        current().note("a checkpoint's cut is told")
        self._watch.note_cut(everywhere, somewhere)
        return super().at_cut(everywhere, somewhere)

    def progress(self) -> Progress:
        progress = super().progress()
        self._watch.check_twice(progress.totals)
        return progress


COORDINATOR_CALLS = tuple(name for name in vars(Coordinator) if not name.startswith("_"))
"""Its methods, none of which waits."""


class Vectors:
    """In place of `model.flat.FlatModule`."""

    def __init__(self, num_shards: int) -> None:
        self.parameter_segments = segments("parameters", num_shards)
        self.statistic_segments = segments("statistics", num_shards)
        self.parameters = torch.zeros(self.parameter_segments[0].numel)
        self.gradients = torch.zeros_like(self.parameters)
        self.statistics = torch.zeros(self.statistic_segments[0].numel)

    def place_gradients(self, vector: Tensor) -> None:
        self.gradients = vector

    def zero_gradients(self) -> None:
        self.gradients.zero_()


class Computer:
    """In place of `GradientComputer`: whole numbers, the same in all elements, and late."""

    def __init__(self, scenario: Scenario, world: World, flat: Vectors) -> None:
        self.flat = flat
        self.statistics_delta = torch.zeros_like(flat.statistics)
        self._before = torch.zeros_like(flat.statistics)
        self._scenario, self._world = scenario, world

    @property
    def pulled(self) -> tuple[Tensor, Tensor]:
        return self.flat.parameters, self._before

    def compute(self, batch: Batch) -> GradientSummary:
        self.begin()
        self.add(batch)
        return self.finish()

    def begin(self) -> None:
        self.flat.zero_gradients()
        self._before.copy_(self.flat.statistics)

    def add(self, batch: Batch) -> None:
        world, dice = self._world, self._world.random
        world.pause(dice.expovariate(1 / self._scenario.compute_s))
        gradient = float(dice.randint(1, 8))
        if dice.random() < self._scenario.not_finite:
            gradient = float("nan")
        change = float(dice.randint(1, 4))
        first, second = torch.tensor_split(self.flat.gradients, 2)
        first.fill_(gradient)
        world.pause(dice.expovariate(1 / self._scenario.compute_s))
        second.fill_(gradient)
        self.flat.statistics.add_(change)
        self.statistics_delta.fill_(change)

    def finish(self) -> GradientSummary:
        return GradientSummary(1.0, 1.0)


class Loader:
    """In place of `BatchLoader`: batches without images."""

    def __init__(self, scenario: Scenario, life: Life) -> None:
        self._scenario, self._life = scenario, life
        self._num_batches = 0

    def batches(self, leases: Iterable[Lease]) -> Iterator[Batch]:
        ahead: deque[Lease] = deque()
        size = self._scenario.config.data.batch_size
        for part in (batch for lease in leases for batch in lease.batches(size)):
            ahead.append(part)
            if len(ahead) > self._scenario.prefetch_batches:
                yield self._batch(ahead.popleft())
        while ahead:
            yield self._batch(ahead.popleft())

    def _batch(self, part: Lease) -> Batch:
        per_push, number = self._scenario.config.batches_per_push, self._num_batches
        self._num_batches += 1
        sequence = 0 if per_push is None else number // per_push
        positions = range(part.start, part.stop)
        self._life.groups.setdefault(sequence, []).append(positions)
        corrupt = tuple(str(p) for p in positions if p in self._scenario.corrupt)
        num_images = len(positions) - len(corrupt)
        labels = LabelLists(torch.zeros(num_images), torch.arange(num_images + 1))
        return Batch(torch.empty(0), labels, part.start, part.stop, corrupt)


class SimulatedWorker(WorkerProcess):
    """One life of a worker, which is known to the watch."""

    def __init__(self, party: Party, watch: Watch, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._party, self._watch = party, watch

    def run(self, worker: int, incarnation: int, *arguments: Any) -> str | None:
        life = self._watch.lives[worker, incarnation] = Life(worker, incarnation)
        self._party.belongings["life"] = life
        current().note(f"{self._party.name} is {worker}.{incarnation}")
        return super().run(worker, incarnation, *arguments)


class SimulatedEvaluator(EvaluatorProcess):
    """Cuts and reads; measures nothing."""

    def __init__(self, party: Party, *arguments: Any) -> None:
        self._config = arguments[0]
        self._evaluator = cast(Any, _Measures())


class _Measures:
    def evaluate(self, state: object, ema: bool = True) -> dict[str, float]:
        return {"loss": 1.0}
