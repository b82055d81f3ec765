"""Folders of runs as training leaves them, without any training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asynception.compare.reading import RunRecord, read_run
from asynception.recipe import save_config, validate

BASELINE = 0.2


def write_run(
    folder: Path,
    *,
    mode: str = "async",
    seed: int = 0,
    curve: Sequence[tuple[int, float]] = ((32, 0.3), (64, 0.5)),
    step_s: float = 1.0,
    began_s: float = 10.0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    **result: Any,
) -> RunRecord:
    """A run of batches of 8 that evaluated `curve`, (samples, map@100), at a steady pace.

    step_s: seconds of training for 8 samples; began_s: what starting took.
    """
    tree: dict[str, dict[str, Any]] = {
        "model": {"name": "xception", "width": 0.05, "middle_blocks": 0},
        "data": {"train": "/t", "val": "/v", "batch_size": 8, "image_size": 32},
        "training": {"samples": curve[-1][0], "seed": seed},
        "consistency": {"mode": mode},
        "run": {"name": folder.name, "storage_path": str(folder.parent)},
    }
    for section, values in (settings or {}).items():
        tree[section] = {**tree.get(section, {}), **values}
    config = validate(tree)
    folder.mkdir(parents=True)
    save_config(config, folder)
    lines = []
    for samples, value in curve:
        time_s = began_s + samples // 8 * step_s
        lines.append(point_line(samples, time_s, step_s * config.scaling.num_workers))
        lines.append(eval_line(samples, time_s + 1, value))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples, final = curve[-1]
    values = {
        "status": "finished",
        "mode": mode,
        "updates": samples // 8,
        "samples": samples,
        "wall_s": began_s + samples // 8 * step_s,
        "samples_per_s": 1.0,
        "staleness": {"mean": 0.0, "p50": 0.0, "p99": 0.0, "max": 0.0},
        "receipts": {"applied": samples // 8},
        "eval": {"map@100": final, "loss": 1.0},
        "baseline": {"map@100": BASELINE, "loss": 2.0},
        "data": {"samples_returned": 0},
        "error": None,
        **result,
    }
    (folder / "result.json").write_text(json.dumps(values))
    return read_run(folder)


def point_line(samples: int, time_s: float, spent_s: float) -> dict[str, Any]:
    """A training point; spent_s: of one worker for a push."""
    phases = {"data_s": 0.0, "pull_s": 0.0, "compute_s": spent_s, "push_s": 0.0}
    return {"kind": "train", "time_s": time_s, "samples": samples, "pushes": samples // 8, **phases}


def eval_line(samples: int, time_s: float, value: float) -> dict[str, Any]:
    metrics = {"map@100": value, "loss": 1.0}
    at = {"time_s": time_s, "samples": samples, "updates": samples // 8}
    return {"kind": "eval", **at, "metrics": metrics, "baseline": {"map@100": BASELINE}}
