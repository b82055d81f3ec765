"""The front door: a config in, a trained model and its figures out."""

import sys
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from asynception.cluster import connected
from asynception.config import TrainConfig
from asynception.controls import Controls
from asynception.failures import Diverged, SessionLost, Stopped, TrainingFailed, one_line
from asynception.ledger import Position
from asynception.monitoring.loggers import open_asides
from asynception.monitoring.opening import open_monitor
from asynception.monitoring.settings import check_packages
from asynception.orders import Order, forget_requests
from asynception.origin import Origin, new_origin, origin_from
from asynception.plan import RunPlan, check_first_weights, plan_run
from asynception.recipe import save_config
from asynception.report import Reporter
from asynception.reservation import Reservation
from asynception.result import RESULT_FILE, Result, Status
from asynception.rollback import lr_factor, slowed
from asynception.run_folder import check_folder, checkpoints_of, taken
from asynception.salvage import NothingLeft, assemble, described
from asynception.session import Ending, Session
from asynception.sizes import Resized, resized
from asynception.totals import Progress, Totals, histograms, staleness_summary
from model.errors import InputError
from ps.checkpoint_store import (
    Saved,
    list_checkpoints,
    read_checkpoint,
    read_metadata,
    set_aside,
)


class Trainer:
    """Trains one run: `Trainer(config).fit()`.

    Without `ray.address`, and unless Ray is initialised already, a local Ray is started and shut
    down again. `resume` goes on from the run's last checkpoint, on any number of servers.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False) -> None:
        """Names the run by the model and the time unless `run.name` is set."""
        if config.run.name is None:
            name = f"{config.model.title}-{datetime.now():%Y%m%d-%H%M%S}"
            config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        self.config = config
        self._resume = resume

    def fit(self, controls: Controls | None = None) -> Result:
        """Train to the end; with `run.detached` in an actor of the cluster, unless this is it.

        `controls`: what another than this process's terminal shows and steers the run by.
        Raises InputError before anything has started for what the user can mend, TrainingFailed
        if the run can't go on, Stopped if it was told to stop; its folder then holds the last
        checkpoint and a `result.json`.
        """
        if self.config.run.detached and controls is None:
            from asynception.detached import train_detached

            return train_detached(self.config, resume=self._resume)
        controls = controls or Controls()
        check_folder(self.config, self._resume)
        check_packages(self.config.monitoring)
        plan = plan_run(self.config)
        if not self._resume:
            check_first_weights(plan.model)
        with (
            connected(self.config.ray, self.config.monitoring.port) as host,
            Reservation(plan, host, controls) as reservation,
            taken(self.config, self._resume) as folder,
        ):
            return _Run(plan, reservation, folder, controls).fit()


class _Run:
    """Sessions one after another, until one reaches the end."""

    def __init__(
        self,
        plan: RunPlan,
        reservation: Reservation,
        folder: Path,
        controls: Controls | None = None,
    ) -> None:
        self._plan, self._reservation, self._folder = plan, reservation, folder
        self._controls = controls or Controls()
        self._checkpoints = checkpoints_of(plan.config, folder)
        self._restarts = self._worker_failures = self._moves = 0
        self._reporter: Reporter | None = None

    def fit(self) -> Result:
        origin = self._first_origin()
        self._restarts = self._controls.entered(self._folder)
        with ExitStack() as closing:
            try:
                save_config(self._plan.config, self._folder)
                forget_requests(self._folder)
                # Opening takes seconds, in which it may be told to stop as well.
                reporter = closing.enter_context(self._open_reporter(origin))
                self._reporter = reporter
                if self._restarts:
                    reporter.event(
                        f"the driver died (death {self._restarts} of the run's); starting again "
                        f"from {origin.position.num_consumed} samples"
                    )
                return self._attempt_until_done(origin, reporter)
            except (KeyboardInterrupt, Stopped):
                self._write_partial("interrupted", None)
                raise
            except Exception as error:
                self._write_partial("failed", one_line(error))
                raise

    def _first_origin(self) -> Origin:
        """As `_origin`. It takes a while to make, in which a new run may be told to stop."""
        try:
            return self._origin()
        except (KeyboardInterrupt, Stopped):
            if not (self._folder / RESULT_FILE).exists():
                self._write_partial("interrupted", None)
            raise

    def _open_reporter(self, origin: Origin) -> Reporter:
        return Reporter(
            self._folder,
            self._plan.config.run.name or "",
            self._plan.total_samples,
            self._plan.config.run.log_every_s,
            start_samples=origin.position.num_consumed,
            started_s=origin.wall_s,
            terminal=Console() if sys.stdout.isatty() else None,
            monitor=open_monitor(self._plan, self._folder),
            open_loggers=partial(open_asides, self._folder, self._plan.config),
            display=self._controls.display,
        )

    def _attempt_until_done(self, origin: Origin, reporter: Reporter) -> Result:
        limit = self._plan.config.failure.max_failures
        while True:
            session = self._session(origin, reporter)
            try:
                ending = session.run()
            except Diverged as error:
                origin = self._roll_back(error, origin.totals.rollbacks)
                reporter.event(
                    f"{error}; starting again from {origin.position.num_consumed} samples with the "
                    f"learning rate times {lr_factor(self._plan, origin.totals.rollbacks):.4g}"
                )
            except Resized as order:
                self._resize(order.num_servers, reporter)
                origin = self._origin()
            except SessionLost as error:
                if 0 <= limit <= self._restarts:
                    raise TrainingFailed(
                        f"{error.what} ({error}) and failure.max_failures = {limit}; go on "
                        f"with --resume"
                    ) from error
                self._restarts += 1
                origin, what_of_it = self._after(session)
                reporter.event(
                    f"{error.what} ({error}); starting again from "
                    f"{origin.position.num_consumed} samples{what_of_it}"
                )
            else:
                break
            finally:
                self._worker_failures += session.num_worker_deaths
                self._moves += session.num_moves
                if session.num_servers_ordered is not None:  # it may have been lost meanwhile
                    self._controls.orders.give(Order(num_servers=session.num_servers_ordered))
        return self._finished(ending)

    def _session(self, origin: Origin, reporter: Reporter) -> Session:
        return Session(
            slowed(self._plan, origin.totals.rollbacks),
            self._reservation.room,
            self._folder,
            reporter,
            origin,
            controls=self._controls,
            lacks=self._reservation.lacks,
        )

    def _resize(self, num_servers: int, reporter: Reporter) -> None:
        """Go on with so many servers, if there is room for them."""
        before, plan = self._plan.config.scaling.num_servers, resized(self._plan, num_servers)
        try:
            self._reservation.change(plan)
        except InputError as error:
            reporter.event(f"not scaled to {num_servers} servers: {error}")
            return
        self._plan = plan
        reporter.resized(plan)
        reporter.event(f"scaled from {before} to {num_servers} servers")

    def _roll_back(self, error: Diverged, num_before: int) -> Origin:
        """The last good checkpoint, or the start; later ones are set aside.

        Raises `error`, or one that says so, if the run is to stop; what was good is its newest.
        """
        training, good = self._plan.config.training, error.checkpoint
        if training.on_divergence == "warn":
            raise error
        may_go_on = training.on_divergence == "rollback" and num_before < training.max_rollbacks
        for path in list_checkpoints(self._checkpoints):
            if (good is not None and path.name > good) or (good is None and may_go_on):
                set_aside(path)
        if training.on_divergence == "stop":
            raise error
        if not may_go_on:
            raise TrainingFailed(
                f"{error}, and training.max_rollbacks = {training.max_rollbacks}"
            ) from error
        origin = self._origin()
        origin.totals.rollbacks = num_before + 1
        return origin

    def _after(self, session: Session) -> tuple[Origin, str]:
        """Where to go on after a session that was lost, and what people are told of it."""
        base, remains = self._origin(), session.remains
        if remains is None:
            return base, ""
        try:
            origin = assemble(self._plan.model.layout, remains, base)
        except NothingLeft as reason:
            return base, f": {reason}"
        return origin, f": {described(remains, base, self._plan.config.wire.pull)}"

    def _last_checkpoint(self) -> Saved | None:
        found = list_checkpoints(self._checkpoints)
        return found[-1] if found else None

    def _origin(self) -> Origin:
        """The last checkpoint, or the start. Raises InputError for one of another model."""
        path = self._last_checkpoint()
        if path is None:
            return new_origin(self._plan)
        slots = tuple(self._plan.config.server_rule.slots)
        checkpoint = read_checkpoint(path, self._plan.model.tensors, slots)
        return origin_from(checkpoint.extra, checkpoint.state, path.name)

    def _finished(self, ending: Ending) -> Result:
        clocks = ending.evaluation.clocks
        return self._write(
            "finished",
            ending.progress,
            clocks.updates,
            ending.wall_s,
            ending.evaluation.metrics,
            ending.checkpoint,
        )

    def _write_partial(self, status: Status, error: str | None) -> None:
        """What the last checkpoint holds, since that is what can be gone on from."""
        path = self._last_checkpoint()
        if path is None:
            self._write(status, Progress(0, Totals()), 0, 0.0, {}, None, error)
            return
        metadata = read_metadata(path)
        extra = metadata["extra"]
        consumed = Position.from_json(extra["position"]).num_consumed
        progress = Progress(consumed, Totals.from_json(extra["totals"]))
        self._write(status, progress, metadata["updates"], extra["wall_s"], {}, path, error)

    def _write(
        self,
        status: Status,
        progress: Progress,
        updates: int,
        wall_s: float,
        metrics: dict[str, float],
        checkpoint: Saved | None,
        error: str | None = None,
    ) -> Result:
        totals = progress.totals
        diagnosis = self._reporter.conclude(status, error) if self._reporter else None
        result = Result(
            status,
            self._plan.config.consistency.mode,
            updates,
            progress.num_consumed,
            round(wall_s, 3),
            round(progress.num_consumed / wall_s, 3) if wall_s else 0.0,
            staleness_summary(totals.staleness),
            _staleness_histograms(totals),
            dict(totals.outcomes),
            metrics,
            self._plan.baseline,
            str(checkpoint) if checkpoint else None,
            self._worker_failures,
            self._restarts,
            dict(totals.updates_lost),
            totals.rollbacks,
            len(totals.corrupt),
            _data_counts(totals),
            error,
            diagnosis.to_json() if diagnosis else {},
            self._moves,
            self._folder,
        )
        result.write()
        return result


def _staleness_histograms(totals: Totals) -> dict[str, Any]:
    return {
        "all": dict(sorted(totals.staleness.items())),
        "workers": histograms(totals.worker_staleness),
        "shards": histograms(totals.shard_staleness),
    }


def _data_counts(totals: Totals) -> dict[str, Any]:
    return {
        "leases": totals.leases,
        "samples_returned": totals.samples_returned,
        "samples_twice": totals.samples_twice,
        "lost": dict(totals.lost),
    }
