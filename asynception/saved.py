"""What can be done with a run's checkpoints without a cluster."""

from pathlib import Path

from asynception.building import build_evaluator
from asynception.config import TrainConfig
from asynception.plan import plan_model
from asynception.recipe import load_config
from asynception.run_files import CONFIG_FILE
from asynception.run_folder import CHECKPOINTS, checkpoints_of
from model.errors import InputError
from ps.checkpoint import Checkpoint
from ps.checkpoint_store import (
    Saved,
    list_checkpoints,
    read_checkpoint,
    read_metadata,
)


def find_checkpoint(run: Path, name: str | None) -> Saved:
    """A run's checkpoint by name, or its last one. Raises InputError."""
    known = (run / CONFIG_FILE).is_file()
    folder = checkpoints_of(load_config(run), run) if known else run / CHECKPOINTS
    found = {path.name: path for path in list_checkpoints(folder)}
    if not found:
        raise InputError(f"{run} holds no checkpoint: name the folder of a run")
    if name is None:
        return list(found.values())[-1]
    if name not in found:
        raise InputError(f"{run} holds no checkpoint {name!r}; it has {', '.join(found)}")
    return found[name]


def load_saved(run: Path, path: Saved) -> tuple[TrainConfig, int, Checkpoint]:
    """A run's config, its number of classes, and one of its checkpoints. Raises InputError."""
    config = load_config(run)
    num_classes: int = read_metadata(path)["extra"]["num_classes"]
    tensors = plan_model(config, num_classes).tensors
    return config, num_classes, read_checkpoint(path, tensors, tuple(config.server_rule.slots))


def evaluate_saved(run: Path, path: Saved, *, ema: bool) -> dict[str, float]:
    """Measures of a checkpoint on the run's held-out images. Raises InputError."""
    config, num_classes, checkpoint = load_saved(run, path)
    return build_evaluator(config, num_classes).evaluate(checkpoint.state, ema=ema)
