"""Runs one after another, each a process of its own, so that none can harm the next."""

import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from asynception.compare.attempts import ATTEMPTS, Attempt, output_path
from asynception.compare.grid import RUNS, PlannedRun
from asynception.compare.groups import differing, flat_settings
from asynception.compare.machine import describe_machine, load_average
from asynception.compare.reading import read_result
from asynception.recipe import load_config, save_config
from asynception.run_files import CONFIG_FILE
from model.errors import InputError

RECIPES, SET_ASIDE = "recipes", "set-aside"
"""In the folder of a comparison: what each run was started with, and runs that never finished."""

STOP_TIMEOUT_S = 60.0
"""How long an interrupted run may take to clean up."""

Say = Callable[[str], object]


def run_all(planned: Sequence[PlannedRun], out: Path, say: Say) -> None:
    """Run all that isn't there and finished; one that fails leaves its error, and the rest go on.

    A run that was begun and never finished is set aside, and begun anew: one that is gone on with
    has another clock. Raises InputError, before anything starts, if `out` holds runs of other
    settings or another process works on it.
    """
    with _taken(out):
        for run in planned:
            _check_same_settings(run)
        for number, run in enumerate(planned, 1):
            title = f"run {number} of {len(planned)}: {run.name}"
            if is_finished(run):
                say(f"{title} is there already")
                continue
            _set_aside(run, out)
            say(f"{title} ...")
            attempt = _attempt(run, out)
            say(f"{title} {_outcome(attempt, run)}")


@contextmanager
def _taken(out: Path) -> Iterator[None]:
    try:
        for name in (RUNS, RECIPES, ATTEMPTS):
            (out / name).mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; choose another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {out}: another comparison is at work there") from None
        yield


def _check_same_settings(run: PlannedRun) -> None:
    if not (run.folder / CONFIG_FILE).is_file():
        return
    there = flat_settings(load_config(run.folder))
    others = differing([there, flat_settings(run.config)])
    if others:
        raise InputError(
            f"--out holds a run of other settings ({run.folder} differs in {', '.join(others)}), "
            "which would be compared with these: choose another --out"
        )


def is_finished(run: PlannedRun) -> bool:
    """Whether the run reached its end."""
    return read_result(run.folder).get("status") == "finished"


def _set_aside(run: PlannedRun, out: Path) -> None:
    if not run.folder.exists():
        return
    place = out / SET_ASIDE
    place.mkdir(exist_ok=True)
    number = 1 + sum(1 for _ in place.glob(f"{run.name}-*"))
    run.folder.rename(place / f"{run.name}-{number}")


def _attempt(run: PlannedRun, out: Path) -> Attempt:
    recipe = out / RECIPES / run.name
    recipe.mkdir(exist_ok=True)
    save_config(run.config, recipe)
    load, started = load_average(), datetime.now(UTC)
    start_s = time.monotonic()
    command = [sys.executable, "-m", "asynception", "train", str(recipe / CONFIG_FILE)]
    code = run_command(command, output_path(out, run.name))
    attempt = Attempt(
        f"{started:%Y-%m-%d %H:%M:%S}",
        round(time.monotonic() - start_s, 3),
        code,
        None if is_finished(run) else _error(run, code, output_path(out, run.name)),
        load,
        describe_machine(),
    )
    attempt.write(out, run.name)
    return attempt


def run_command(command: Sequence[str], output: Path) -> int:
    """The exit code of a command, which is ended with this process's own interruption.

    All that it says goes to `output`. It has a process group of its own, so that Ctrl-C reaches
    it once, from here.
    """
    with output.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            return process.wait()
        except BaseException:
            _stop(process)
            raise


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _error(run: PlannedRun, code: int, output: Path) -> str:
    """Why a run is not finished, in one line."""
    error = read_result(run.folder).get("error")
    if error:
        return str(error)
    lines = output.read_text("utf-8", errors="replace").splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if said:
        return said[-1]
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{how}; {output} has what it said"


def _outcome(attempt: Attempt, run: PlannedRun) -> str:
    if attempt.error is not None:
        return f"failed after {attempt.took_s:.0f} s: {attempt.error}"
    result = read_result(run.folder)
    known = {name: value for name, value in result["eval"].items() if value is not None}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in known.items())
    return f"finished in {attempt.took_s:.0f} s: {shown}"
