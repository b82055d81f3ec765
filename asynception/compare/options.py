"""What the command line of a comparison says, read and checked."""

import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from asynception.config import TrainConfig
from model.errors import InputError

_SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Conditions:
    """What all runs of a comparison have in common, besides the recipe."""

    num_seeds: int = 3
    num_samples: int | None = None
    """Images that each run trains on; None for what the recipe says."""
    budget_s: float | None = None
    """Seconds after which a run takes on no more images."""
    slow_workers: Mapping[int, float] = field(default_factory=dict)
    """By worker, how many times as long its computations take."""

    def overrides(self) -> list[str]:
        """As arguments of `asynception train`."""
        settings: dict[str, Any] = {}
        if self.num_samples is not None:
            settings |= {"training.epochs": "none", "training.samples": self.num_samples}
        if self.budget_s is not None:
            settings["training.max_s"] = self.budget_s
        if self.slow_workers:
            # What a slow worker has leased and read ahead is what a run ends with waiting for.
            settings |= {"data.lease_batches": 1, "data.prefetch_batches": 1}
        settings |= {f"scaling.slow_workers.{w}": factor for w, factor in self.slow_workers.items()}
        return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 90s, 10m or 1.5h. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if seconds <= 0:
        raise InputError(
            f"--budget {text!r} is no duration: give a number above 0 with s, m or h, like 10m"
        )
    return seconds


def parse_slow(texts: Iterable[str]) -> dict[int, float]:
    """Factors by worker from texts such as 1x20. Raises InputError."""
    slow: dict[int, float] = {}
    for text in texts:
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text.strip())
        if match is None or float(match[2]) < 1:
            raise InputError(
                f"--slow {text!r} names no slow worker: give WORKERxFACTOR with a factor of at "
                "least 1, like 1x20 for worker 1 at a twentieth of its speed"
            )
        if int(match[1]) in slow:
            raise InputError(f"--slow names worker {match[1]} twice: give it one factor")
        slow[int(match[1])] = float(match[2])
    return slow


def parse_modes(text: str) -> list[str]:
    """The modes of a comma-separated list. Raises InputError."""
    modes = [each.strip() for each in text.split(",") if each.strip()]
    known = mode_names()
    for mode in modes:
        if mode not in known:
            raise InputError(f"--modes has {mode!r}, which is none: choose from {','.join(known)}")
    if not modes or len(set(modes)) < len(modes):
        raise InputError(f"--modes {text!r}: name one or more modes, each once")
    return modes


def mode_names() -> list[str]:
    """What consistency.mode can be."""
    return list(_policies())


def mode_settings(mode: str) -> set[str]:
    """The settings of [consistency] that a mode knows, its name left out."""
    return set(_policies()[mode].model_fields) - {"mode"}


def _policies() -> dict[str, type[BaseModel]]:
    """The settings classes of all modes, by the mode's name."""
    members = _classes(TrainConfig.model_fields["consistency"].annotation)
    return {
        typing.get_args(member.model_fields["mode"].annotation)[0]: member for member in members
    }


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _classes(argument)


def split_consistency(overrides: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Overrides without those of [consistency], and the latter one by one.

    Values stay with their names. Raises InputError for consistency.mode, which --modes chooses.
    """
    rest: list[str] = []
    consistency: list[list[str]] = []
    words = list(overrides)
    while words:
        override = [words.pop(0)]
        if "=" not in override[0] and words and not words[0].startswith("--"):
            override.append(words.pop(0))
        if not override[0].startswith("--consistency."):
            rest += override
            continue
        if consistency_key(override) == "mode":
            raise InputError(f"{' '.join(override)}: --modes chooses what is compared; remove it")
        consistency.append(override)
    return rest, consistency


def consistency_key(override: Sequence[str]) -> str:
    """KEY of --consistency.KEY or --consistency.KEY.MORE, with or without a value."""
    return override[0].partition("=")[0].split(".")[1]


def check_budget(num_samples: int | None, budget: str | None) -> float | None:
    """The budget in seconds, if there is one. Raises InputError."""
    if budget is None:
        return None
    if num_samples is not None:
        raise InputError(f"--budget {budget} and --samples {num_samples}: give one of them")
    seconds = parse_duration(budget)
    assert math.isfinite(seconds)
    return seconds
