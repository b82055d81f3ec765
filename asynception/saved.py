"""What can be done with a run's checkpoints without a cluster."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from asynception.config import TrainConfig
from asynception.plan import (
    build_flat,
    build_objective,
    open_val,
    plan_model,
    val_loader,
)
from asynception.recipe import load_config
from asynception.saver import CHECKPOINTS
from model.errors import InputError
from ps.checkpoint import (
    Checkpoint,
    list_checkpoints,
    read_checkpoint,
    read_metadata,
)
from worker.evaluator import Evaluator, load_state


def find_checkpoint(run: Path, name: str | None) -> Path:
    """A run's checkpoint by name, or its last one. Raises InputError."""
    found = {path.name: path for path in list_checkpoints(run / CHECKPOINTS)}
    if not found:
        raise InputError(f"{run} holds no checkpoint: name the folder of a run")
    if name is None:
        return list(found.values())[-1]
    if name not in found:
        raise InputError(f"{run} holds no checkpoint {name!r}; it has {', '.join(found)}")
    return found[name]


def _load(run: Path, path: Path) -> tuple[TrainConfig, int, Checkpoint]:
    config = load_config(run)
    num_classes: int = read_metadata(path)["extra"]["num_classes"]
    tensors = plan_model(config, num_classes).tensors
    return config, num_classes, read_checkpoint(path, tensors, tuple(config.optimizer.slots))


def evaluate_saved(run: Path, path: Path, *, ema: bool) -> dict[str, float]:
    """Measures of a checkpoint on the run's held-out images. Raises InputError."""
    config, num_classes, checkpoint = _load(run, path)
    source = open_val(config)
    evaluator = Evaluator(
        build_flat(config, num_classes),
        build_objective(config, num_classes),
        val_loader(config, source),
        sum(source.shard_sizes),
        config.evaluation.map_k,
    )
    return evaluator.evaluate(checkpoint.state, ema=ema)


def export_saved(run: Path, path: Path, out: Path, *, ema: bool) -> None:
    """Write the tensors of the model's state dict, BN's counters included. Raises InputError."""
    config, num_classes, checkpoint = _load(run, path)
    flat = build_flat(config, num_classes)
    load_state(flat, checkpoint.state, ema=ema)
    state = {name: tensor.clone() for name, tensor in flat.module.state_dict().items()}
    try:
        save_file(state, out, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:  # it has its own error for a missing folder
        raise InputError(f"--out {out} can't be written: {error}") from None
