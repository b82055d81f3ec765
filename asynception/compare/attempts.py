"""What is noted of each run that a comparison started: how it ended, and on what machine."""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

ATTEMPTS = "attempts"
"""In the folder of a comparison: a .json and a .txt with all that was said, for each run."""


@dataclass(frozen=True)
class Attempt:
    """How the command of one run went."""

    started: str
    """Date and time, UTC."""
    took_s: float
    exit_code: int
    """Negative for a signal's number."""
    error: str | None
    load_before: float
    """The machine's load average when the run was started."""
    machine: dict[str, Any]

    def write(self, out: Path, name: str) -> None:
        """Keep it in the comparison's folder."""
        path = _path(out, name)
        incomplete = path.with_name(f".incomplete-{path.name}")
        incomplete.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
        os.replace(incomplete, path)

    @classmethod
    def read(cls, out: Path, name: str) -> Self | None:
        """What was kept of a run; None if nothing was."""
        try:
            values = json.loads(_path(out, name).read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return cls(**{each.name: values[each.name] for each in fields(cls)})


def _path(out: Path, name: str) -> Path:
    return out / ATTEMPTS / f"{name}.json"


def output_path(out: Path, name: str) -> Path:
    """Where all goes that a run's command says."""
    return out / ATTEMPTS / f"{name}.txt"
