"""Which runs a comparison consists of: every mode with every seed, all else equal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asynception.compare.options import (
    Conditions,
    consistency_key,
    mode_settings,
    split_consistency,
)
from asynception.config import TrainConfig
from asynception.recipe import load_config, parse_overrides, validate
from asynception.run_folder import folder_of
from model.errors import InputError

RUNS = "runs"
"""In the folder of a comparison: the folders of its runs."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison."""

    name: str
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """Where it is or will be."""
        return folder_of(self.config)


def plan_runs(
    recipe: Path,
    modes: Sequence[str],
    conditions: Conditions,
    overrides: Sequence[str],
    out: Path,
) -> list[PlannedRun]:
    """All modes with the first seed, then all with the next, so that drift hits them alike.

    Settings of [consistency] apply to the modes that know them. Raises InputError.
    """
    rest, consistency = split_consistency(overrides)
    rest = [*conditions.overrides(), *rest]
    _check_known(consistency, modes)
    configs = {mode: _config_of(mode, recipe, rest, consistency) for mode in modes}
    return [
        _planned(mode, config, number, out)
        for number in range(conditions.num_seeds)
        for mode, config in configs.items()
    ]


def _check_known(consistency: Sequence[Sequence[str]], modes: Sequence[str]) -> None:
    for override in consistency:
        key = consistency_key(override)
        if not any(key in mode_settings(mode) for mode in modes):
            raise InputError(
                f"consistency.{key} is a setting of none of --modes {','.join(modes)}: remove it"
            )


def _config_of(
    mode: str, recipe: Path, rest: Sequence[str], consistency: Sequence[Sequence[str]]
) -> TrainConfig:
    """The recipe in a mode; what it says of its own mode is nothing to another."""
    known = mode_settings(mode)
    own = [word for each in consistency if consistency_key(each) in known for word in each]
    base = load_config(recipe, rest)
    if base.consistency.mode == mode:
        return load_config(recipe, [*rest, *own])
    settings = {"mode": mode, **parse_overrides(own).get("consistency", {})}
    return validate({**dict(base), "consistency": settings})


def _planned(mode: str, config: TrainConfig, number: int, out: Path) -> PlannedRun:
    training = config.training
    seed = training.seed + number
    name = f"{mode}-seed{seed}"
    place = {"name": name, "storage_path": str(out.absolute() / RUNS)}
    config = config.model_copy(
        update={
            "training": training.model_copy(update={"seed": seed}),
            "run": config.run.model_copy(update=place),
        }
    )
    return PlannedRun(name, config)
