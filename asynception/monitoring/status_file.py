"""status.json in a run's folder: how a run is, for whoever sees the folder.

Written whole and atomically, every few seconds while the run goes on and once at its end, so that
reading it needs neither Ray nor a connection, nor torch, which takes seconds to import.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import InputError

STATUS_FILE = "status.json"


def write_status(folder: Path, values: Mapping[str, Any]) -> None:
    """Replace the file; what isn't finite becomes null. Raises OSError."""
    incomplete = folder / f".incomplete-{STATUS_FILE}"
    incomplete.write_text(json.dumps(_strict(values), indent=1, allow_nan=False) + "\n")
    os.replace(incomplete, folder / STATUS_FILE)


def read_status(run: Path) -> dict[str, Any]:
    """Of a run's folder. Raises InputError if there is none."""
    path = run / STATUS_FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{path} is not there: name the folder of a run that has begun (run.storage_path/NAME)"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}") from None
    return values


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
