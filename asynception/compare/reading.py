"""What runs left: their configs, results and curves."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from asynception.compare.attempts import Attempt
from asynception.compare.grid import RUNS, PlannedRun
from asynception.config import TrainConfig
from asynception.recipe import load_config
from asynception.report import METRICS_FILE
from asynception.result import RESULT_FILE
from asynception.run_files import CONFIG_FILE
from asynception.totals import PHASES
from model.errors import InputError


@dataclass(frozen=True)
class Evaluation:
    """Measures of the EMA at one state of a run."""

    samples: int
    """That updates were made of: what was lost isn't in it."""
    updates: int
    time_s: float
    """Seconds of training up to that state; see `RunRecord.evaluations`."""
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """One run as it lies on disk."""

    path: Path
    config: TrainConfig
    result: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[Mapping[str, Any]] = ()
    """Of metrics.jsonl."""
    attempt: Attempt | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def seed(self) -> int:
        return self.config.training.seed

    @property
    def status(self) -> str:
        """finished, failed, interrupted, or unfinished if the run said nothing of its end."""
        if self.result:
            return str(self.result["status"])
        return "failed" if self.attempt is not None else "unfinished"

    @property
    def error(self) -> str | None:
        said = self.result.get("error") or (self.attempt.error if self.attempt else None)
        return str(said) if said and self.status != "finished" else None

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def metric(self) -> str:
        """The name of the measure by which runs are compared: map@k or top1; higher is better."""
        softmax = self.config.training.objective == "softmax"
        return "top1" if softmax else f"map@{self.config.evaluation.map_k}"

    @cached_property
    def points(self) -> list[Mapping[str, Any]]:
        """The training points that the end of the run stands on, by rising samples."""
        return _unreverted(line for line in self.lines if line["kind"] == "train")

    @cached_property
    def began_s(self) -> float:
        """When training began, on the clock of metrics.jsonl, which runs while actors start.

        What the workers have spent on their pushes by some point, before that point. They never
        spend more than there was, but report late, so the least of all points is nearest; 0 if
        there is none.
        """
        spent_s, pushes, found = 0.0, 0, []
        for point in self.points:
            per_push_s = sum(point.get(f"{phase}_s") or 0.0 for phase in PHASES)
            spent_s += (point["pushes"] - pushes) * per_push_s / self.config.scaling.max_workers
            pushes = point["pushes"]
            if pushes:
                found.append(point["time_s"] - spent_s)
        return max(0.0, min(found, default=0.0))

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Those that the end of the run stands on, by rising samples.

        metrics.jsonl has when an evaluation was done. The time of its state is when updates had
        been made of its samples, between two points by interpolation, and never later than that.
        """
        lines = _unreverted(line for line in self.lines if line["kind"] == "eval")
        return [
            Evaluation(line["samples"], line["updates"], self._trained_s(line), line["metrics"])
            for line in lines
        ]

    def _trained_s(self, line: Mapping[str, Any]) -> float:
        done_s: float = line["time_s"] - self.began_s
        if not self.points:
            return done_s
        return min(done_s, float(np.interp(line["samples"], *self._kept)))

    @cached_property
    def _kept(self) -> tuple[list[float], list[float]]:
        """Samples whose gradients were not lost, and when training had come to so many (s).

        Both rise strictly, from the start on.
        """
        dropped, samples, times = 0, [0.0], [0.0]
        for point in self.points:
            dropped += point.get("dropped") or 0
            receipts = point["pushes"] * self.config.scaling.num_servers
            kept = point["samples"] * (1 - dropped / receipts if receipts else 1.0)
            if kept > samples[-1]:
                samples.append(kept)
                times.append(point["time_s"] - self.began_s)
        return samples, times


def _unreverted(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without what came before a return to an earlier checkpoint, and lay beyond it."""
    kept: list[Mapping[str, Any]] = []
    for line in lines:
        while kept and kept[-1]["samples"] >= line["samples"]:
            kept.pop()
        kept.append(line)
    return kept


def read_run(folder: Path) -> RunRecord:
    """Raises InputError for a folder that is no run's."""
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder} is no run: it has no {CONFIG_FILE}; name the folder of a run")
    folder = folder.absolute()
    attempt = Attempt.read(folder.parent.parent, folder.name)
    return RunRecord(
        folder, load_config(folder), read_result(folder), metrics_lines(folder), attempt
    )


def read_planned(run: PlannedRun) -> RunRecord:
    """A run of this comparison, whatever became of it."""
    if (run.folder / CONFIG_FILE).is_file():
        return read_run(run.folder)
    attempt = Attempt.read(run.folder.parent.parent, run.name)
    return RunRecord(run.folder, run.config, attempt=attempt)


def read_result(folder: Path) -> Mapping[str, Any]:
    """A run's result.json; empty if there is none."""
    try:
        values: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    return values


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The runs that are named, those of a named comparison included. Raises InputError."""
    found: dict[Path, None] = {}
    for path in paths:
        within = sorted(each.parent for each in (path / RUNS).glob(f"*/{CONFIG_FILE}"))
        is_comparison = bool(within) and not (path / CONFIG_FILE).is_file()
        found |= dict.fromkeys(
            each.absolute() for each in (_by_age(within) if is_comparison else [path])
        )
    return list(found)


def _by_age(runs: Sequence[Path]) -> list[Path]:
    """As they were run, so that groups come in the order in which modes were named."""
    return sorted(runs, key=lambda run: ((run / CONFIG_FILE).stat().st_mtime, run.name))


def metrics_lines(folder: Path) -> list[Mapping[str, Any]]:
    """Of metrics.jsonl, without any that a kill cut short."""
    try:
        text = (folder / METRICS_FILE).read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in map(_parsed, text.splitlines()) if line is not None]


def _parsed(line: str) -> Mapping[str, Any] | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) and "kind" in value else None
