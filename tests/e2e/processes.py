"""The command line as a subprocess, and what can be seen of the processes it starts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

PROGRAM = (str(Path(sys.executable).with_name("asynception")),)

POLL_S = 0.05
RUN_TIMEOUT_S = 240.0
"""A run takes seconds; this is for machines that do much else."""
GONE_TIMEOUT_S = 60.0
SHOWN_CHARACTERS = 3000
"""Of each stream of a command that failed."""


def wait_for(predicate: Callable[[], T], timeout_s: float, what: str) -> T:
    """The first true value of `predicate`. Raises TimeoutError."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no {what} in {timeout_s:.0f} s")
        time.sleep(POLL_S)
    return value


STARTED: list["Command"] = []
"""Every command of this test session."""


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code (negative: a signal's number) and what it said."""

    code: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        """For pytest, which shows no more than a line of what isn't text."""
        said = (f"ended with {self.code}", self.stdout[-SHOWN_CHARACTERS:])
        return "\n".join((*said, self.stderr[-SHOWN_CHARACTERS:]))


class Command:
    """A command in a session of its own, by whose number its processes are known for ever."""

    def __init__(self, folder: Path, *command: str, env: Mapping[str, str] | None = None) -> None:
        """`folder` takes what the command says, and is its working directory."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._stdout, self._stderr = folder / "stdout.txt", folder / "stderr.txt"
        # Files, since a pipe would stay open as long as any process that inherited it.
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self._started_s = time.monotonic()
        self.took_s = 0.0
        """From its start to the end of `wait`."""
        STARTED.append(self)

    @property
    def output(self) -> Outcome:
        """What it said so far; the code is -1 while it goes on."""
        code = self.process.poll()
        said = (self._stdout.read_text(), self._stderr.read_text())
        return Outcome(-1 if code is None else code, *said)

    def wait(self, timeout_s: float = RUN_TIMEOUT_S) -> Outcome:
        """Its outcome. Raises TimeoutError, with what it said, once it is killed."""
        try:
            self.process.wait(timeout_s)
            self.took_s = time.monotonic() - self._started_s
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise TimeoutError(f"still running after {timeout_s:.0f} s: {self.output}") from None
        return self.output

    def signal_group(self, number: signal.Signals) -> None:
        """Signal the process group, as a terminal does at Ctrl-C."""
        os.killpg(self.process.pid, number)

    def processes(self) -> list[psutil.Process]:
        """All that it started and that live, whoever their parent is by now."""
        return list(self._processes())

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                is_ours = os.getsid(process.pid) == self.process.pid
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def titled(self, title: str) -> list[psutil.Process]:
        """Its Ray workers whose process title begins so, oldest first."""
        return sorted(
            (each for each in self.processes() if title_of(each).startswith(title)),
            key=lambda each: each.create_time(),  # known already: `process_iter` has asked
        )

    def wait_until_gone(self, timeout_s: float = GONE_TIMEOUT_S) -> None:
        """Raises TimeoutError, with their names, if processes are left."""
        try:
            wait_for(lambda: not self.processes(), timeout_s, "end of all processes")
        except TimeoutError:
            left = [title_of(process) for process in self.processes()]
            raise TimeoutError(f"left running after {timeout_s:.0f} s: {left}") from None

    def kill_all(self) -> None:
        """Kill whatever is left."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(GONE_TIMEOUT_S)


def title_of(process: psutil.Process) -> str:
    """Its command line; empty if it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def train_words(recipe: Path, settings: Mapping[str, Any], *, resume: bool = False) -> list[str]:
    """The words of a `train` command."""
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return ["train", str(recipe), *options, *(["--resume"] if resume else [])]


class TrainRun(Command):
    """`asynception train`, and what it writes into its run's folder."""

    def __init__(
        self,
        folder: Path,
        recipe: Path,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """The run is kept in folder/runs/RUN unless the settings say otherwise."""
        settings = {"run.name": "RUN", "run.storage_path": folder / "runs", **settings}
        self.path = Path(settings["run.storage_path"]) / settings["run.name"]
        super().__init__(folder, *PROGRAM, *train_words(recipe, settings, resume=resume), env=env)

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one kind, but for one that is being written."""
        return [line for line in read_metrics(self.path) if line["kind"] == kind]

    def wait_for_folder(self) -> None:
        """Until its config is written, which is before it starts any worker."""
        wait_for((self.path / "config.toml").exists, RUN_TIMEOUT_S, "config.toml")

    def wait_for_samples(self, num_samples: int) -> None:
        """Until it has trained on so many."""

        def arrived() -> bool:
            assert self.process.poll() is None, f"it ended too early: {self.output}"
            points = self.metrics("train")
            return bool(points) and points[-1]["samples"] >= num_samples

        wait_for(arrived, RUN_TIMEOUT_S, f"{num_samples} samples in metrics.jsonl")

    def wait_for_workers(self, number: int, wanted: int) -> None:
        """Until so many of so many that are wanted are at work."""

        def arrived() -> bool:
            assert self.process.poll() is None, str(self.output)
            points = self.metrics("train")
            counts = points and (points[-1]["workers"], points[-1]["workers_wanted"])
            return counts == (number, wanted)

        wait_for(arrived, RUN_TIMEOUT_S, f"{number} of {wanted} workers")

    def result(self) -> dict[str, Any]:
        return read_result(self.path)

    def checkpoints(self) -> list[str]:
        """Names of the whole ones, oldest first."""
        return checkpoints(self.path)


EVENT_TIMEOUT_S = 120.0


def only(run: TrainRun, title: str) -> psutil.Process:
    """The newest process of this title, once there is one."""
    return wait_for(lambda: run.titled(title), EVENT_TIMEOUT_S, f"process {title}")[-1]


def events(run: TrainRun) -> list[str]:
    return [event["text"] for event in run.metrics("event")]


def wait_for_event(run: TrainRun, text: str) -> None:
    wait_for(
        lambda: any(text in event for event in events(run)), EVENT_TIMEOUT_S, f"event {text!r}"
    )


def read_result(run: Path) -> dict[str, Any]:
    """result.json, which must be strict JSON."""
    return strict_json((run / "result.json").read_text())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The finished lines of metrics.jsonl, each of which must be strict JSON."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [strict_json(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def strict_json(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def checkpoints(run: Path) -> list[str]:
    """Names of a run's whole checkpoints, oldest first."""
    return sorted(path.parent.name for path in run.glob("checkpoints/checkpoint-*/metadata.json"))
