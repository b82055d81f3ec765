"""A run whose driver is an actor of the cluster, so that it outlives whoever started it."""

import json
import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from asynception.cluster import connected
from asynception.config import TrainConfig
from asynception.controls import Controls
from asynception.orders import Order, Orders
from asynception.relay import Mark, News, Relay
from asynception.result import Result
from asynception.trainer import Trainer
from model.errors import InputError

ACTOR = "driver"
"""Name of the driver's actor in the namespace of its run."""

LIVES_FILE = "driver.json"
"""In a run's folder: which actor drives it, and how often that had died."""

MAX_QUESTIONS = 16
"""Answered at once."""

ORDER_TIMEOUT_S = 60.0
"""For a run to take on an order."""

FETCH_TIMEOUT_S = 30.0
"""For somebody who is attached to ask for the outcome, once the run has ended."""

FAREWELL_S = 3.0
"""Others who are attached ask within so long after the first."""


def namespace_of(run_name: str) -> str:
    """Ray's namespace for a run's named actor."""
    return f"asynception-{run_name}"


class DriverProcess:
    """Drives a run in a thread, and answers those who are attached to it.

    Its own actors are servers, workers and so on, which Ray kills when it dies. Ray then starts it
    again, and it goes on from the last checkpoint. When the run has ended, so does the actor.
    """

    def __init__(self, config: TrainConfig, resume: bool) -> None:
        context = ray.get_runtime_context()
        self._actor_id = context.get_actor_id()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Ray's, of a name that it uses
            self._is_new = not context.was_current_actor_reconstructed
        self._trainer = Trainer(config, resume=resume or not self._is_new)
        self._relay, self._orders = Relay(config.run.name or ""), Orders()
        self._stopping, self._ended, self._fetched = (threading.Event() for _ in range(3))
        self._result: Result | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._drive, name="driver", daemon=True).start()

    def _drive(self) -> None:
        controls = Controls(
            self._relay.display, self._relay.add, self._stopping, self._orders, self._enter
        )
        try:
            self._result = self._trainer.fit(controls)
        except BaseException as error:  # it is those who ask for the outcome that handle it
            self._error = error
        self._ended.set()
        self._fetched.wait(FETCH_TIMEOUT_S)
        time.sleep(FAREWELL_S)
        ray.kill(ray.get_runtime_context().current_actor)

    def _enter(self, folder: Path) -> int:
        """Note whose run this is; returns how often this actor had died."""
        path = folder / LIVES_FILE
        num_deaths = 0
        if not self._is_new and path.is_file():
            lives = json.loads(path.read_text())
            num_deaths = 1 + (lives["deaths"] if lives["actor"] == self._actor_id else 0)
        incomplete = path.with_name(f".incomplete-{path.name}")
        incomplete.write_text(json.dumps({"actor": self._actor_id, "deaths": num_deaths}))
        os.replace(incomplete, path)
        return num_deaths

    def news(self, since: Mark | None) -> News:
        """What there is to show, from this mark on; None for the last few."""
        ended = self._ended.is_set()  # asked first: the lines are then the last ones
        return self._relay.news(since, ended)

    def stop(self) -> None:
        """Have the run save a checkpoint and end; returns at once."""
        self._stopping.set()

    def scale(self, order: Order) -> str:
        """Have the run carry out an order; what becomes of it. Raises InputError."""
        try:
            return self._orders.give(order).result(timeout=ORDER_TIMEOUT_S)
        except TimeoutError:
            raise InputError(
                f"the run takes no orders at this moment (waited {ORDER_TIMEOUT_S:g} s): it is "
                "about to begin or to end; `asynception attach` shows which"
            ) from None

    def outcome(self) -> Result:
        """Of a run that has ended. Raises what ended it."""
        assert self._ended.is_set(), "the run goes on"
        self._fetched.set()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


DriverActor = ray.remote(num_cpus=0)(DriverProcess)


def start(config: TrainConfig, *, resume: bool) -> Any:
    """Start a run's driver on this node of the cluster, which Ray is connected to.

    Should the node die, the driver goes on elsewhere, if the run's folder is to be seen there.
    Raises InputError if a run of this name goes on.
    """
    name = config.run.name
    assert name is not None
    storage = config.run.storage_path
    if "://" not in storage:  # which is refused, by this name
        storage = os.path.abspath(storage)
    config = config.model_copy(
        update={"run": config.run.model_copy(update={"storage_path": storage})}
    )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: dict[str, Any] = {
        "name": ACTOR,
        "namespace": namespace_of(name),
        "lifetime": "detached",
        "max_concurrency": MAX_QUESTIONS,
        "max_restarts": config.failure.max_failures,
        "scheduling_strategy": here,
    }
    try:
        return DriverActor.options(**options).remote(config, resume)
    except ValueError:
        raise InputError(
            f"run.name = {name} goes on at ray.address = {config.ray.address}: choose another name,"
            f" or see it with `asynception attach {name}`"
        ) from None


def find(run_name: str) -> Any:
    """The driver of a run that goes on at the cluster that Ray is connected to, else None."""
    try:
        return ray.get_actor(ACTOR, namespace=namespace_of(run_name))
    except ValueError:
        return None


def train_detached(config: TrainConfig, *, resume: bool) -> Result:
    """Start a detached run, and show it to its end. Raises as `Trainer.fit` does."""
    from asynception.attached import follow

    with connected(config.ray):
        return follow(start(config, resume=resume), config.run.name or "")
