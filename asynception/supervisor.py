"""Keeps a run's workers going: starts them, notices their ends, replaces those that died."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from asynception.actors import Connection, Start, WorkerActor
from asynception.cluster import Room
from asynception.failures import SessionLost, TrainingFailed, one_line
from asynception.places import Places
from asynception.plan import RunPlan
from asynception.report import Reporter
from asynception.shortage import named
from asynception.staff import Staff
from asynception.totals import Progress
from model.errors import InputError
from ps.client import ParameterClient, ShardUnavailable
from ps.receipts import NOTHING_SETTLED, Settled
from ps.schedule import Clocks


class Supervisor:
    """Workers as Ray actors, one bundle each. The others never notice what happens to one."""

    def __init__(
        self,
        plan: RunPlan,
        room: Room,
        coordinator: Any,
        client: ParameterClient,
        connection: Connection,
        reporter: Reporter,
    ) -> None:
        self._plan, self._room = plan, room
        self._coordinator, self._client, self.connection = coordinator, client, connection
        self._reporter = reporter
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, int] = {}
        self._incarnations: dict[int, int] = {}
        self._fruitless: Counter[int] = Counter()
        self._places = Places(room)
        self.staff = Staff(plan.config, room, self._places, self._actors, reporter.event)
        self.num_deaths = 0

    @property
    def running(self) -> list[Any]:
        """A Ray reference for each worker at work, ready when that worker has ended."""
        return list(self._running)

    @property
    def lives(self) -> dict[int, tuple[int, Any]]:
        """By worker, the incarnation and the actor of its present life."""
        return {w: (self._incarnations[w], actor) for w, actor in self._actors.items()}

    def reroute(self, shard: int, address: str, epoch: int) -> None:
        """Have all workers, and those that begin later, find a shard where it is served now.

        Any thread may call. A life that begins meanwhile is told, or begins with the new address.
        """
        self.connection = self.connection.moved(shard, address)
        for actor in tuple(self._actors.values()):
            actor.reroute.remote(shard, address, epoch)

    def start_due(self, num_consumed: int) -> None:
        """Start a worker in every place that is to have one after so many samples.

        A place for which there is no work any more stays empty, and nobody waits for it.
        """
        epoch = num_consumed / self._plan.train.num_samples
        policy, room = self._plan.config.consistency, self._room.workers
        due, staff = policy.workers_at(epoch, len(room.wanted)), self.staff
        if room.comes_and_goes and staff.open():
            self._announce(())  # until it has entered, nobody waits for a worker
        max_workers = self._plan.config.scaling.max_workers
        was_scaled_down = not staff.num_opened and len(room.wanted) < max_workers
        if was_scaled_down:
            room.want(range(len(room.wanted)))  # whichever were left then: these are filled first
        while staff.num_opened < due:
            if not ray.get(self._coordinator.has_work.remote()):
                staff.num_opened = due
                self._announce(self._present)
                return
            self._start(staff.num_opened)
            staff.num_opened += 1
        if was_scaled_down:  # in an earlier session: nobody waits for the others from the start
            self._announce(self._present)
        self._fill(staff.num_vacant(due))

    def _fill(self, num_vacant: int) -> None:
        """Start workers in so many vacant places, if these have room.

        Raises TrainingFailed if nobody has had room for too long.
        """
        if not num_vacant or not ray.get(self._coordinator.has_work.remote()):
            return
        ready = self.staff.ready(num_vacant)
        for worker in ready:
            self._start(worker)
        if ready:
            names = ", ".join(map(str, ready))
            plural = "s" if len(ready) > 1 else ""
            self._reporter.event(f"worker{plural} {names} began: {self.staff.described}")
            if not self._enter_by_themselves:
                self._announce(self._present)
        self.staff.check_enough(lacks_room=len(ready) < num_vacant)
        if self._places.deserted_s(not self._actors) > self._plan.config.run.placement_timeout_s:
            self._fail_for_room()

    def _enlist(self, worker: int) -> int:
        incarnation = self._incarnations.get(worker, -1) + 1
        ray.get(self._coordinator.enlist.remote(worker, incarnation))
        self._incarnations[worker] = incarnation
        return incarnation

    def _end(self, worker: int, settled: Settled | None = None) -> int:
        """End its present life; returns how many samples it left."""
        ended = self._coordinator.end.remote(worker, settled, self._incarnations[worker])
        left: int = ray.get(ended)
        return left

    def _start(self, worker: int) -> None:
        incarnation = self._enlist(worker)
        actor = self._create(worker, WorkerActor, max_concurrency=2)  # it answers while it runs
        self._places.begin(worker, actor.ready.remote())
        ended = actor.run.remote(
            worker, incarnation, self.connection, self._coordinator, self._start_clocks()
        )
        self._running[ended] = worker

    def _create(self, worker: int, kind: Any, **more: Any) -> Any:
        """An actor of this kind in a worker's place, with nothing to do yet."""
        config = self._plan.config
        num_threads = max(1, int(config.scaling.process_resources.get("CPU", 1)))
        options = {**self._room.for_worker(worker), **more}
        actor = kind.options(**options).remote(config, self._plan.train.num_classes, num_threads)
        self._actors[worker] = actor
        return actor

    def _start_clocks(self) -> Start:
        """A worker's own schedule goes on from here."""
        config = self._plan.config
        progress: Progress = ray.get(self._coordinator.progress.remote())
        num_samples = progress.num_consumed
        samples_per_step = config.data.batch_size * self.staff.num_sharing
        clocks = Clocks(num_samples // samples_per_step, num_samples)
        horizon = self._plan.horizon.model_copy(update={"num_workers": self.staff.num_sharing})
        return Start(horizon, clocks)

    def settle(self, ended: Any) -> None:
        """Deal with the end of a worker: its work was done, it left, or it died and is replaced.

        Raises InputError for what the user can mend, TrainingFailed if workers die without end,
        SessionLost if the servers don't answer.
        """
        worker = self._running.pop(ended)
        left = False
        try:
            why_left: str | None = ray.get(ended)
        except RayError as error:
            if isinstance(error, InputError):
                raise InputError(str(cause_of(error))) from None
            self._bury(worker, error)
        else:
            left = why_left is not None
            if why_left is None:
                self._end(worker)
            else:
                self._part_with(worker, why_left)
        self._dismiss(worker)
        goes_on = ray.get(self._coordinator.has_work.remote())
        if not goes_on or left or self._enter_by_themselves:
            # Where workers enter by themselves, nobody waits for this one while it starts.
            self._announce(self._present)
        if self.staff.gone(worker, left) and goes_on:
            self._start(worker)

    def conclude(self) -> None:
        """Every push is settled: what is still accumulated at the servers is applied."""
        self._announce(())

    def _announce(self, workers: Collection[int]) -> None:
        """These go on, and no other may be waited for."""
        if not self._plan.config.consistency.needs_roster:
            return
        try:
            self._client.expect(workers)
        except ShardUnavailable as error:
            raise SessionLost(str(error)) from error

    @property
    def _present(self) -> list[int]:
        """Workers that can be waited for.

        Where workers enter by themselves, one that lacks room holds nobody up until it has entered,
        which this process may learn of late.
        """
        lacking = () if self._enter_by_themselves else self._places.lacking
        return [worker for worker in self._running.values() if worker not in lacking]

    @property
    def _enter_by_themselves(self) -> bool:
        return self._plan.config.consistency.max_lead is not None

    def _dismiss(self, worker: int) -> None:
        self._places.end(worker)
        ray.kill(self._actors.pop(worker))

    def _bury(self, worker: int, error: RayError) -> None:
        """Fence a dead worker off and return what it left to the coordinator."""
        self.num_deaths += 1
        settled, left = self._take_back(worker)
        self._reporter.event(
            f"worker {worker} died after {settled.everywhere + 1} pushes "
            f"({one_line(cause_of(error))}); {left} samples go back to be handed out"
        )
        if settled.everywhere >= 0:
            self._fruitless[worker] = 0
        elif not self._places.lost_its_node(worker):
            self._fruitless[worker] += 1
        self._check_limits(worker, error)

    def _part_with(self, worker: int, why: str) -> None:
        """A worker left with all its pushes settled; the rest of its lease goes back."""
        settled, left = self._take_back(worker)
        self._reporter.event(
            f"worker {worker} left after {settled.everywhere + 1} pushes: {why}; {left} samples go "
            "back to be handed out"
        )

    def _take_back(self, worker: int) -> tuple[Settled, int]:
        """Fence a life off; how far its pushes had come, and how many samples it left."""
        incarnation = self._incarnations[worker]
        try:
            lives = self._client.fence(worker, incarnation + 1)
        except ShardUnavailable as unavailable:
            raise SessionLost(str(unavailable)) from unavailable
        settled = lives.get(incarnation, NOTHING_SETTLED)
        return settled, self._end(worker, settled)

    def _check_limits(self, worker: int, error: RayError) -> None:
        failure = self._plan.config.failure
        if self._fruitless[worker] >= failure.max_fruitless_failures:
            raise TrainingFailed(
                f"worker {worker} died {self._fruitless[worker]} times in a row before its first "
                f"push: {one_line(cause_of(error))}"
            ) from error
        if 0 <= failure.max_worker_failures < self.num_deaths:
            raise TrainingFailed(
                f"{self.num_deaths} workers died, and failure.max_worker_failures = "
                f"{failure.max_worker_failures}; the last one: {one_line(cause_of(error))}"
            ) from error

    def stop(self) -> None:
        """Kill all workers."""
        for worker in list(self._actors):
            self._dismiss(worker)

    def look_after(self, silent_s: Mapping[int, float]) -> None:
        """Kill workers that have not been heard of for too long, so that they are replaced, and see
        to places without room. To be called often.

        Raises TrainingFailed if no place has room, SessionLost if the servers don't answer.
        """
        limit_s = self._plan.config.failure.worker_timeout_s
        self._heed_notices()
        for worker in self._places.newly_arrived():
            self._reporter.event(f"worker {worker} is back and goes on")
            self._announce(self._present)
        self._go_on_without(self._places.newly_lacking(silent_s, limit_s))
        for worker, seconds in silent_s.items():
            if self._places.silence_s(worker, seconds) > limit_s and self._is_at_work(worker):
                self._reporter.event(f"worker {worker} was silent for {seconds:.0f} s; killing it")
                ray.kill(self._actors[worker])

    def _is_at_work(self, worker: int) -> bool:
        """Whether it has not ended yet; `settle` may not have been told so."""
        endings = (ending for ending, each in self._running.items() if each == worker)
        has_ended = any(ray.wait([ending], timeout=0)[0] for ending in endings)
        return worker in self._actors and not has_ended

    def _heed_notices(self) -> None:
        self.staff.heed_notices()

    def _go_on_without(self, workers: Sequence[int]) -> None:
        """Nobody waits for workers that lack room, until they have it."""
        for worker in workers:
            self._reporter.event(f"{self._why_absent(worker)}; the others go on without it")
            enters_later = self._incarnations[worker] > 0 or self._room.workers.comes_and_goes
            if self._enter_by_themselves and not enters_later:
                ray.kill(self._actors[worker])  # later lives are not waited for until they enter
        if workers:
            self._announce(self._present)
        limit_s = self._plan.config.run.placement_timeout_s
        nobody = self._places.lacking.issuperset(self._running.values())
        if self._running and nobody and self._places.lacking_s() > limit_s:
            self._fail_for_room()

    def _fail_for_room(self) -> NoReturn:
        limit_s = self._plan.config.run.placement_timeout_s
        raise TrainingFailed(
            f"no node has had room for any worker for run.placement_timeout_s = {limit_s:g}: "
            f"each needs {named(self._room.worker_resources)}; add nodes and go on with "
            "--resume, or wait longer"
        )

    def _why_absent(self, worker: int) -> str:
        if self._places.has_node(worker):
            limit_s = self._plan.config.failure.worker_timeout_s
            return f"worker {worker} has not begun in {limit_s:g} s: its node is slow or cut off"
        needs = named(self._room.worker_resources)
        return f"worker {worker} waits for room: its node is gone, and no other has {needs}"

    def seen(self, progress: Progress) -> Progress:
        """`progress` without the workers that have no process yet, and with how many are wanted."""
        silent_s, absent = progress.silent_s, self._places.absent
        present = {worker: s for worker, s in silent_s.items() if worker not in absent}
        return replace(progress, silent_s=present, num_wanted=len(self._room.workers.wanted))


def cause_of(error: RayError) -> BaseException:
    """What an actor's code raised, or Ray's own error if the actor is gone."""
    if isinstance(error, RayTaskError | RayActorError):
        return error.cause if isinstance(error, RayTaskError) else error
    # An error that can't be pickled, as many can't whose __init__ takes more than a text: Ray says
    # so at first, and at last what it was.
    return Exception(str(error).strip().rpartition("\n")[2].strip())
