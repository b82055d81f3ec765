"""One set of servers and workers, from a state to the end of the data or to a lost server."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import grpc
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from asynception.actors import CoordinatorActor
from asynception.alarms import Alarms, Watch
from asynception.budget import Budget
from asynception.cluster import Room
from asynception.controls import Controls
from asynception.due import Due
from asynception.evaluator_actor import Evaluation, EvaluatorActor
from asynception.failover import Failover
from asynception.failures import SessionLost, Stopped, TrainingFailed, one_line
from asynception.journal import JOURNAL_FILE, Journal
from asynception.ledger import Ledger
from asynception.origin import Origin
from asynception.plan import RunPlan
from asynception.report import Reporter
from asynception.run_folder import checkpoints_of
from asynception.salvage import LOST, Gathering, NothingLeft, Remains
from asynception.saver import Failure, Saver
from asynception.servers import START_TIMEOUT_S, Servers
from asynception.sizes import Lacks, Resized, Sizes
from asynception.spots import NoRoom
from asynception.supervisor import Supervisor
from asynception.supervisors import supervisor_kind
from asynception.totals import Progress, Totals
from ps.checkpoint_store import Saved, read_metadata
from ps.client import ShardUnavailable, cut_lead
from ps.tls import identities

POLL_S = 0.5
LAST_EVALUATIONS = 3
"""Tries of the evaluation without which a run has no result."""

LAST_CHECKPOINTS = 2
"""More tries of the last checkpoint, where servers may have changed."""

MAX_CUT_WAIT_S = 10.0
"""How long a shard may take to reach a cut's version; then it is copied where it stands."""


@dataclass
class Ending:
    """How a session ended."""

    progress: Progress
    evaluation: Evaluation
    checkpoint: Saved
    wall_s: float


class Session:
    """Drives a run from the driver's process; all work happens in actors."""

    def __init__(
        self,
        plan: RunPlan,
        room: Room,
        folder: Path,
        reporter: Reporter,
        origin: Origin,
        clock: Callable[[], float] = time.monotonic,
        controls: Controls | None = None,
        lacks: Lacks = lambda plan: None,
    ) -> None:
        self._plan, self._room, self._folder, self._lacks = plan, room, folder, lacks
        self._controls = controls or Controls()
        self._reporter, self._origin, self._clock = reporter, origin, clock
        self._began_s = clock()
        self._actors: list[Any] = []
        self._servers: Servers | None = None
        self._sizes: Sizes | None = None
        self._watch = Watch(plan.config, origin.totals, origin.checkpoint)
        self._num_strangers = self._num_coordinator_deaths = 0
        self._journal = Journal(folder.absolute() / JOURNAL_FILE)  # actors may be elsewhere
        self.num_worker_deaths = self.num_moves = 0
        self.remains: Remains | None = None
        """What is left if a server was lost, and the others can go on as they are."""

    @property
    def wall_s(self) -> float:
        """Seconds that the run has taken, earlier sessions included."""
        return self._origin.wall_s + self._clock() - self._began_s

    @property
    def num_servers_ordered(self) -> int | None:
        """What an order asked for that this session has not carried out."""
        return self._sizes.num_servers if self._sizes else None

    def run(self) -> Ending:
        """Train to the end of the budget.

        Raises InputError, TrainingFailed, Stopped, or, if it may be gone on from a checkpoint,
        SessionLost or Resized. No actor is left behind, whatever happens.
        """
        try:
            with self._started() as parts:
                try:
                    return self._drive(*parts)
                except LOST:
                    self._gather(*parts)
                    raise
        except (RayActorError, ShardUnavailable, GetTimeoutError) as error:
            raise SessionLost(one_line(error)) from error
        finally:
            if self._servers is not None:
                self._servers.kill()
            for actor in self._actors:
                ray.kill(actor)
            self._journal.remove()

    def _gather(self, failover: Failover, coordinator: Any, *parts: Any) -> None:
        """If a server is lost, take what is left, before all actors are killed."""
        try:
            gathering = Gathering(self._plan, parts[-1], coordinator)
            self.remains = gathering.gather(failover.serving, self._origin, self.wall_s)
        except NothingLeft as reason:
            self._reporter.event(f"the others' state is of no use: {reason}")

    @contextmanager
    def _started(self) -> Iterator[tuple[Failover, Any, "_Evaluations", Saver, Supervisor]]:
        """All actors of the session, with the origin's state loaded into the servers."""
        config, token = self._plan.config, secrets.token_hex(16)
        servers = self._servers = Servers(
            self._plan, self._room, token, identities(config.security)
        )
        connection = servers.start()
        client = connection.open(config)
        coordinator = self._start_coordinator()
        origin = self._origin
        folder = checkpoints_of(config, self._folder)
        saver = Saver(self._plan, folder, client, coordinator, origin.state, origin.totals)
        saver.spared = self._watch.spared
        supervisor = supervisor_kind(config)(
            self._plan, self._room, coordinator, client, connection, self._reporter
        )
        evaluations = _Evaluations(self._plan, self._room, supervisor)
        evaluations.prepare()
        failover = Failover(
            self._plan,
            servers,
            connection,
            (client.follow, supervisor.reroute),
            self._reporter.event,
        )
        client.give_up_if(failover.is_lost)
        try:
            client.load(origin.state, origin.shard_clocks)
            failover.begin()
            self._reporter.attend(client)
            yield failover, coordinator, evaluations, saver, supervisor
        finally:
            self._reporter.attend(None)
            failover.stop()
            self.num_moves = failover.num_moves
            self.num_worker_deaths = supervisor.num_deaths
            supervisor.stop()
            evaluations.stop()
            client.close()
            saver.close()

    def _start_coordinator(self) -> Any:
        plan = self._plan
        ledger = Ledger(
            plan.total_samples,
            plan.config.data.batch_size,
            plan.lease_end,
            self._origin.position,
            plan.config.batches_per_push,
        )
        self._journal.create()
        options = self._room.for_coordinator()
        coordinator = CoordinatorActor.options(**options).remote(
            ledger, self._origin.totals, self._journal
        )
        self._actors.append(coordinator)
        return coordinator

    def _drive(
        self,
        failover: Failover,
        coordinator: Any,
        evaluations: "_Evaluations",
        saver: Saver,
        supervisor: Supervisor,
    ) -> Ending:
        """The loop of the run."""
        alarms = Alarms(self._plan.config, self._origin.totals)
        progress: Progress = ray.get(coordinator.progress.remote())
        supervisor.start_due(progress.num_consumed)
        due = Due(self._plan, progress.num_consumed, self._clock)
        budget = Budget(self._plan.config.training.max_s, self._origin, self._clock)
        sizes = self._sizes = Sizes(self._plan, supervisor.staff, self._lacks)
        while not progress.finished:
            if budget.is_spent(progress):
                ray.get(coordinator.close.remote(), timeout=START_TIMEOUT_S)
            waited_for = [*failover.watched, *supervisor.running, *evaluations.running]
            ready, _ = ray.wait(waited_for, timeout=POLL_S)
            for reference in ready:
                self._handle(reference, failover, evaluations, supervisor)
            failover.check()
            progress = ray.get(coordinator.progress.remote(), timeout=START_TIMEOUT_S)
            self._reporter.progress(supervisor.seen(progress))
            self._report_coordinator(progress.coordinator_deaths)
            alarms.check(progress.totals, self._watch.good_checkpoint)
            for warning in self._watch.warnings(progress.totals, len(progress.silent_s)):
                self._reporter.event(warning)
            supervisor.look_after(progress.silent_s)
            self._controls.orders.carry_out(sizes, self._folder)
            supervisor.start_due(progress.num_consumed)
            num_readable = self._num_readable(progress)
            if not evaluations.running and due.evaluation(num_readable):
                evaluations.begin(self._cut_wait_s(progress))
            outcome = saver.outcome()
            self._report_checkpoint(outcome, saver.took_s)
            self._report_strangers(saver.num_unauthenticated)
            self._change_servers(sizes, outcome)
            if self._controls.stopping.is_set():
                self._stop(saver, progress)
            if not saver.busy and (sizes.num_servers or due.checkpoint(num_readable)):
                sizes.is_saving = sizes.num_servers is not None
                saver.begin(self.wall_s, self._cut_wait_s(progress))
        supervisor.conclude()
        return self._finish(progress, evaluations, saver, failover)

    def _num_readable(self, progress: Progress) -> int:
        """Samples of the state that the servers hold."""
        reduces = self._plan.config.reduces
        return progress.num_published if reduces else progress.num_consumed

    def _cut_wait_s(self, progress: Progress) -> float:
        """Long enough for a few updates at this run's pace, so that a cut waits for no other."""
        scaling = self._plan.config.scaling
        per_update = self._plan.config.consistency.pushes_per_update(scaling.max_workers)
        pushes = progress.totals.pushes - self._origin.totals.pushes
        update_s = per_update * (self._clock() - self._began_s) / max(1, pushes)
        return min(MAX_CUT_WAIT_S, 2 * cut_lead(scaling.num_servers) * update_s)

    def _handle(
        self,
        reference: Any,
        failover: Failover,
        evaluations: "_Evaluations",
        supervisor: Supervisor,
    ) -> None:
        if reference in failover.watched:
            ray.get(reference)
            raise SessionLost("a server stopped")
        if reference in evaluations.running:
            self._report_evaluation(evaluations.outcome())
        else:
            supervisor.settle(reference)

    def _change_servers(self, sizes: Sizes, checkpoint: Saved | Failure | None) -> None:
        """End the session once the checkpoint is there from which other servers are to begin."""
        number = sizes.num_servers
        if not sizes.is_saving or checkpoint is None or number is None:
            return
        sizes.forget()
        if not isinstance(checkpoint, Failure):
            raise Resized(number)
        self._reporter.event(f"not scaled to {number} servers, for want of a checkpoint")

    def _stop(self, saver: Saver, progress: Progress) -> NoReturn:
        """Save how far the run is, and end it."""
        self._report_checkpoint(saver.outcome(wait=True), saver.took_s)
        saver.begin(self.wall_s, self._cut_wait_s(progress))
        self._report_checkpoint(saver.outcome(wait=True), saver.took_s)
        raise Stopped("the run was told to stop; --resume goes on from its last checkpoint")

    def _finish(
        self, progress: Progress, evaluations: "_Evaluations", saver: Saver, failover: Failover
    ) -> Ending:
        """All pushes are settled: evaluate and save the very end."""
        wall_s = self.wall_s
        self._report_checkpoint(saver.outcome(wait=True), saver.took_s)
        saver.begin(wall_s, wait_s=0)
        if evaluations.running:
            self._report_evaluation(evaluations.outcome())
        evaluations.begin(wait_s=0)
        checkpoint = self._last_checkpoint(saver, failover)
        self._report_strangers(saver.num_unauthenticated)
        if saver.num_uncompensated:
            self._reporter.event(
                f"{saver.num_uncompensated} pushes were applied without delay compensation: what "
                "they were computed from was no longer kept (docs/consistency.md)"
            )
        evaluation = self._last_evaluation(evaluations)
        totals = Totals.from_json(read_metadata(checkpoint)["extra"]["totals"])
        return Ending(replace(progress, totals=totals), evaluation, checkpoint, wall_s)

    def _last_checkpoint(self, saver: Saver, failover: Failover) -> Saved:
        """Of one that was begun, or of another try where another server may have what one lost."""
        checkpoint = saver.outcome(wait=True)
        self._report_checkpoint(checkpoint, saver.took_s)
        for _ in range(LAST_CHECKPOINTS if failover.may_have_moved else 0):
            if not isinstance(checkpoint, Failure) or not checkpoint.is_of_the_session:
                break
            saver.begin(self.wall_s, wait_s=0)
            checkpoint = saver.outcome(wait=True)
            self._report_checkpoint(checkpoint, saver.took_s)
        if isinstance(checkpoint, Failure) and checkpoint.is_of_the_session:
            raise SessionLost(checkpoint.reason)
        if checkpoint is None or isinstance(checkpoint, Failure):
            raise TrainingFailed(f"the last checkpoint could not be written: {checkpoint}")
        return checkpoint

    def _last_evaluation(self, evaluations: "_Evaluations") -> Evaluation:
        """Of one that was begun, or of another try."""
        for _ in range(LAST_EVALUATIONS):
            outcome = evaluations.outcome()
            self._report_evaluation(outcome)
            if isinstance(outcome, Evaluation):
                return outcome
            evaluations.begin(wait_s=0)
        raise SessionLost(f"the last evaluation failed {LAST_EVALUATIONS} times")

    def _report_evaluation(self, outcome: Evaluation | str) -> None:
        if isinstance(outcome, str):
            self._reporter.event(outcome)
        else:
            clocks = outcome.clocks
            self._reporter.evaluation(
                clocks.samples, clocks.updates, outcome.metrics, self._plan.baseline
            )

    def _report_coordinator(self, num_deaths: int) -> None:
        if num_deaths > self._num_coordinator_deaths:
            self._num_coordinator_deaths = num_deaths
            self._reporter.event(
                "the coordinator died; another goes on from its journal, and training went on"
            )

    def _report_strangers(self, num_calls: int) -> None:
        if num_calls > self._num_strangers:
            self._num_strangers = num_calls
            self._reporter.event(
                f"{num_calls} calls to the servers came without the run's token and were refused; "
                "who can reach their ports? (docs/security.md)"
            )

    def _report_checkpoint(self, outcome: Saved | Failure | None, took_s: float) -> None:
        if isinstance(outcome, Failure):
            self._reporter.event(outcome.reason)
        elif outcome is not None:
            self._reporter.checkpoint(outcome.name, took_s)
            self._watch.saved(outcome.name)


class _Evaluations:
    """The evaluator's actor, one evaluation at a time. Training outlives its death."""

    def __init__(self, plan: RunPlan, room: Room, supervisor: Supervisor) -> None:
        """supervisor: knows where the servers are."""
        self._plan, self._room, self._supervisor = plan, room, supervisor
        self._actor: Any = None
        self.running: list[Any] = []
        """The Ray reference of the evaluation under way, if there is one."""

    def prepare(self) -> None:
        """Start the actor, unless it is there."""
        if self._actor is None:
            self._actor = EvaluatorActor.options(**self._room.for_evaluator()).remote(
                self._plan.config, self._plan.train.num_classes
            )

    def begin(self, wait_s: float) -> None:
        """Start to evaluate the EMA as of about now."""
        self.prepare()
        self.running = [self._actor.evaluate.remote(self._supervisor.connection, wait_s)]

    def outcome(self) -> Evaluation | str:
        """Of the evaluation begun last, once it has ended; a string says why it failed."""
        (reference,), self.running = self.running, []
        try:
            evaluation: Evaluation = self._room.evaluated(reference)
        except (RayActorError, ShardUnavailable, NoRoom, grpc.RpcError) as error:
            self.stop()
            return f"an evaluation was given up: {type(error).__name__}"
        return evaluation

    def stop(self) -> None:
        """Kill the actor; the next evaluation starts a new one."""
        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = None
