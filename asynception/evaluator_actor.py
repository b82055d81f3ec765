"""The Ray actor that evaluates while training goes on."""

from dataclasses import dataclass

import ray
import torch

from asynception.actors import Connection
from asynception.building import build_evaluator
from asynception.config import TrainConfig
from asynception.publishing import read_state
from ps.malloc import tune_malloc
from ps.schedule import Clocks
from worker.evaluator import EMA_VECTORS, RAW_VECTORS


@dataclass(frozen=True)
class Evaluation:
    """Measures of the EMA at a cut; `raw_` ones, if asked for, of the parameters themselves."""

    clocks: Clocks
    version_skew: int
    metrics: dict[str, float]


class EvaluatorProcess:
    """Evaluates cuts of the EMA while training goes on."""

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        torch.set_num_threads(1)
        tune_malloc()
        self._config = config
        self._evaluator = build_evaluator(config, num_classes)

    def evaluate(self, connection: Connection, wait_s: float) -> Evaluation:
        """Cut all shards at one version (see `ParameterClient.cut`), and evaluate that."""
        client = connection.open(self._config)
        raw = self._config.evaluation.raw
        vectors = EMA_VECTORS + (RAW_VECTORS if raw else ())
        state = read_state(self._config, client, "evaluation", vectors, wait_s)
        client.close()
        metrics = self._evaluator.evaluate(state)
        if raw:
            of_raw = self._evaluator.evaluate(state, ema=False)
            metrics |= {f"raw_{name}": value for name, value in of_raw.items()}
        return Evaluation(state.clocks, state.version_skew, metrics)


EvaluatorActor = ray.remote(EvaluatorProcess)
