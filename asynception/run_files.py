"""Files in a run's folder that can be read without knowing what the settings in them mean."""

import tomllib
from pathlib import Path

from model.errors import InputError

CONFIG_FILE = "config.toml"
"""The resolved config in a run's folder."""


def is_detached(folder: Path) -> bool:
    """Whether the run that is kept here is, or was, started with `run.detached`.

    The file is not checked as a config, which would import torch. Raises InputError if it can't be
    read.
    """
    path = folder / CONFIG_FILE
    try:
        run = tomllib.loads(path.read_text(encoding="utf-8")).get("run", {})
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}") from None
    return isinstance(run, dict) and run.get("detached") is True
