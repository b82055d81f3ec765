"""What stands between a person and a detached run: seeing it, leaving it, ending it."""

import json
import time
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayTaskError,
)
from rich.console import Console

from asynception.cluster import connected
from asynception.config import RayConfig
from asynception.console import Display
from asynception.detached import find
from asynception.failures import Stopped, TrainingFailed, one_line
from asynception.recipe import load_config
from asynception.relay import Mark, News, show
from asynception.result import RESULT_FILE, Result
from asynception.run_files import CONFIG_FILE
from model.errors import InputError

POLL_S = 0.5
"""Seconds between questions for what there is to show."""

RETURN_TIMEOUT_S = 120.0
"""For a driver that died to be started again."""


class Detached(KeyboardInterrupt):
    """Ctrl-C, which ends the showing of a run and not the run."""


def follow(driver: Any, run_name: str) -> Result:
    """Show a run until it ends. Raises what ended it; Detached at Ctrl-C.

    Raises TrainingFailed if its driver is dead for good, or doesn't answer.
    """
    try:
        return _follow(driver, run_name)
    except KeyboardInterrupt:
        raise Detached(
            f"{run_name} goes on without being shown: `asynception attach {run_name}` shows it "
            f"again, `asynception stop {run_name}` ends it"
        ) from None


def _follow(driver: Any, run_name: str) -> Result:
    display, total_samples = Display(run_name, 0, Console()), 0
    since: Mark | None = None
    try:
        while True:
            news: News = ask(driver.news, since)
            if news.total_samples != total_samples:  # not known while it waits for room
                display.close()
                total_samples = news.total_samples
                display = Display(run_name, total_samples, Console())
            show(news, display)
            since = news.following
            if news.ended:
                return cast(Result, ask(driver.outcome))
            time.sleep(POLL_S)
    finally:
        display.close()


def ask(method: Any, *arguments: Any) -> Any:
    """The answer of a driver, also if it has to be started again first.

    Raises what it raised, TrainingFailed if it is dead for good or doesn't answer.
    """
    deadline_s = time.monotonic() + RETURN_TIMEOUT_S
    while True:
        try:
            return ray.get(method.remote(*arguments), timeout=RETURN_TIMEOUT_S)
        except (ActorUnavailableError, GetTimeoutError) as error:
            if time.monotonic() > deadline_s:
                raise TrainingFailed(
                    f"the driver of the run has not answered for {RETURN_TIMEOUT_S:.0f} s "
                    f"({one_line(error)}): its node is slow or cut off, and it may go on; attach "
                    "again, or end it with `asynception stop --force`"
                ) from error
            time.sleep(POLL_S)
        except RayTaskError as error:
            raise _cause(error) from None
        except RayActorError as error:
            raise TrainingFailed(
                f"the driver of the run is dead ({one_line(error)}): go on with --resume"
            ) from error


def _cause(error: RayTaskError) -> BaseException:
    """What the run raised, as it would have here."""
    cause: BaseException = error.cause
    known = isinstance(cause, InputError | TrainingFailed | Stopped)
    return cause if known else TrainingFailed(one_line(cause))


def attach(run: str, address: str | None) -> Result | str:
    """Show the run until it ends; the text of its `result.json` if it has ended.

    run: its folder, or its name. address: of the cluster; without it, the folder's config says
    which. Raises as `follow`, InputError if there is nothing to be found, TrainingFailed if a
    folder says that the run had failed.
    """
    name, config = named(run, address)
    with connected(config):
        driver = find(name)
        if driver is not None:
            return follow(driver, name)
    return _ended(run, name, config)


def stop(run: str, address: str | None, *, force: bool) -> None:
    """End a run with a whole checkpoint, shown until then; by force at once, and with the last one.

    Raises InputError if it doesn't go on, TrainingFailed if it failed meanwhile.
    """
    name, config = named(run, address)
    with connected(config):
        driver = find(name)
        if driver is None:
            raise InputError(f"{name} doesn't go on at ray.address = {config.address}")
        if force:
            ray.kill(driver)
            return
        ask(driver.stop)
        try:
            follow(driver, name)
        except Stopped:
            return


def named(run: str, address: str | None) -> tuple[str, RayConfig]:
    """A run's name, and where it goes on."""
    folder = Path(run)
    if (folder / CONFIG_FILE).is_file():
        config = load_config(folder)
        return config.run.name or "", RayConfig(address=address or config.ray.address or "auto")
    return run, RayConfig(address=address or "auto")


def _ended(run: str, name: str, config: RayConfig) -> str:
    path = Path(run) / RESULT_FILE
    if not path.is_file():
        raise InputError(
            f"{name} doesn't go on at ray.address = {config.address}, and there is no {path}: "
            "name the run's folder, or the address of its cluster"
        )
    text = path.read_text()
    result = json.loads(text)
    if result["status"] == "finished":
        return text
    raise TrainingFailed(
        f"{name} has ended: {result['error'] or result['status']}; go on with --resume"
    )
