"""Asynception: asynchronous parameter-server training for PyTorch on Ray."""

from asynception import packages

packages.check_not_shadowed()

from asynception.config import (  # noqa: E402
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainConfig,
)
from asynception.failures import Diverged, TrainingFailed  # noqa: E402
from asynception.result import Result  # noqa: E402
from asynception.trainer import Trainer  # noqa: E402
from model.errors import InputError  # noqa: E402

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
