"""Measuring in a process of its own: what might hang, crash or change the process it is in."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MeasureFailed(RuntimeError):
    """The measuring process ended without figures, or not in time."""


def measure_apart(script: Path, limit_s: float, env: Mapping[str, str] | None = None) -> Any:
    """What `script` prints as JSON in its last line. It finds the same packages as this process.

    env: all of the script's environment but for PYTHONPATH; this process's unless given.
    Raises MeasureFailed.
    """
    env = dict(os.environ if env is None else env)
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-P", str(script)]  # -P: its folder's names hide no others
    try:
        ended = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        raise MeasureFailed(f"{script.stem} did not end in {limit_s:g} s") from None
    lines = ended.stdout.decode(errors="replace").strip().splitlines()
    if ended.returncode != 0 or not lines:
        said = ended.stderr.decode(errors="replace").strip().splitlines()
        last = said[-1] if said else "nothing said"
        raise MeasureFailed(f"{script.stem} ended with code {ended.returncode}: {last}")
    return json.loads(lines[-1])
