"""Asynception: asynchronous parameter-server training for PyTorch on Ray.

What stands here is imported when it is first asked for: torch and Ray take seconds, which neither
a mistyped command nor a process that needs one small module should wait for.
"""

import importlib
from typing import TYPE_CHECKING

from asynception import packages

packages.check_not_shadowed()

if TYPE_CHECKING:
    from asynception.config import CheckpointConfig, FailureConfig, RunConfig, TrainConfig
    from asynception.config_scaling import ScalingConfig
    from asynception.failures import Diverged, TrainingFailed
    from asynception.result import Result
    from asynception.trainer import Trainer
    from model.errors import InputError

__all__ = [
    "CheckpointConfig",
    "Diverged",
    "FailureConfig",
    "InputError",
    "Result",
    "RunConfig",
    "ScalingConfig",
    "TrainConfig",
    "Trainer",
    "TrainingFailed",
]

_MODULES = {
    "asynception.config": ("CheckpointConfig", "FailureConfig", "RunConfig", "TrainConfig"),
    "asynception.config_scaling": ("ScalingConfig",),
    "asynception.failures": ("Diverged", "TrainingFailed"),
    "asynception.result": ("Result",),
    "asynception.trainer": ("Trainer",),
    "model.errors": ("InputError",),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
