"""Where a run's curves go: TensorBoard always, Weights & Biases and MLflow if asked for."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, Final, Protocol

from asynception.config import TrainConfig
from worker.exchange import Chain

WANDB_ID_FILE: Final = ".wandb-run"
MLFLOW_ID_FILE: Final = ".mlflow-run"
"""In a run's folder: what the service knows it by, so that a resumed run goes on there."""

MAX_PENDING: Final = 100
"""Calls to a service that is slow; what comes on top is left out."""

CLOSE_TIMEOUT_S: Final = 30.0


class Logger(Protocol):
    """Draws curves over samples. Calls come one at a time."""

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """Points of curves at so many samples, by the curves' names; NaN draws none."""

    def histogram(self, tag: str, counts: Mapping[int, int], samples: int) -> None:
        """How often each whole number came."""

    def rewind(self, samples: int) -> None:
        """The run fell back to there: what is drawn beyond it counts no more."""

    def close(self) -> None:
        """Nothing more comes."""


class Aside:
    """A logger whose service may be slow or fail: its calls are made in a thread of their own.

    After the first failure, which `tell` is told of, it gets no more.
    """

    def __init__(
        self, name: str, open_logger: Callable[[], Logger], tell: Callable[[str], None]
    ) -> None:
        self._name, self._tell, self._failed = name, tell, False
        self._chain = Chain(f"logger-{name}")
        self._pending: list[Future[None]] = []
        self._opened = self._chain.submit(open_logger)

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """See `Logger.scalars`."""
        self._submit(lambda logger: logger.scalars(values, samples))

    def histogram(self, tag: str, counts: Mapping[int, int], samples: int) -> None:
        """See `Logger.histogram`."""
        self._submit(lambda logger: logger.histogram(tag, counts, samples))

    def rewind(self, samples: int) -> None:
        """See `Logger.rewind`."""
        self._submit(lambda logger: logger.rewind(samples))

    def close(self) -> None:
        """Wait for what is under way, but not for ever."""
        self._submit(lambda logger: logger.close())
        late = wait_for(self._pending, CLOSE_TIMEOUT_S).not_done
        self._check()
        if late and not self._failed:
            self._tell(f"{self._name} took more than {CLOSE_TIMEOUT_S:.0f} s for its last curves")
        self._chain.close()

    def _submit(self, call: Callable[[Logger], None]) -> None:
        self._check()
        if not self._failed and len(self._pending) < MAX_PENDING:
            self._pending.append(self._chain.submit(lambda: call(self._opened.result())))

    def _check(self) -> None:
        """Whatever another's package raises, the run goes on."""
        done = [each for each in self._pending if each.done()]
        self._pending = [each for each in self._pending if not each.done()]
        error = next((each.exception() for each in done if each.exception()), None)
        if error is not None and not self._failed:
            self._failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            self._tell(f"{self._name} gets no more curves: {reason}")


class WeightsAndBiases:
    """One run at Weights & Biases, or offline as WANDB_MODE says."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import wandb

        id_file = folder / WANDB_ID_FILE
        self._wandb = wandb
        self._run = wandb.init(
            project=config.monitoring.wandb_project,
            name=config.run.name,
            id=id_file.read_text() if id_file.is_file() else None,
            resume="allow",
            dir=str(folder),
            settings=wandb.Settings(silent=True),
            config=config.model_dump(mode="json"),
        )
        id_file.write_text(self._run.id)
        # Their own steps may not fall, as samples do when a run falls back to a checkpoint.
        self._run.define_metric("*", step_metric="samples")

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """See `Logger.scalars`."""
        self._run.log({**_known(values), "samples": samples})

    def histogram(self, tag: str, counts: Mapping[int, int], samples: int) -> None:
        """See `Logger.histogram`."""
        if counts:
            values = list(range(min(counts), max(counts) + 1))
            edges = [value - 0.5 for value in (*values, values[-1] + 1)]
            heights = [counts.get(value, 0) for value in values]
            drawn = self._wandb.Histogram(np_histogram=(heights, edges))
            self._run.log({tag: drawn, "samples": samples})

    def rewind(self, samples: int) -> None:
        """Points can't be taken back there: the curve goes on from an earlier sample."""

    def close(self) -> None:
        """See `Logger.close`."""
        self._run.finish()


class MLflow:
    """One run of an MLflow experiment, at a tracking server or in a local store."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        settings = config.monitoring
        self._client: Any = MlflowClient(tracking_uri=settings.mlflow_uri)
        experiment = self._client.get_experiment_by_name(settings.mlflow_experiment)
        id_file = folder / MLFLOW_ID_FILE
        if id_file.is_file():
            self._id = id_file.read_text()
            self._client.update_run(self._id, "RUNNING")
            return
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(settings.mlflow_experiment)
        )
        run = self._client.create_run(experiment_id, run_name=config.run.name)
        self._id = run.info.run_id
        id_file.write_text(self._id)
        params = [Param(key, value[:500]) for key, value in _flattened(config)]
        for start in range(0, len(params), 100):  # as many as one call may bring
            self._client.log_batch(self._id, params=params[start : start + 100])

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """See `Logger.scalars`. MLflow's names have no @."""
        now_ms = int(time.time() * 1000)
        metrics = [
            self._metric(name.replace("@", "_at_"), value, now_ms, samples)
            for name, value in _known(values).items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def histogram(self, tag: str, counts: Mapping[int, int], samples: int) -> None:
        """MLflow has none."""

    def rewind(self, samples: int) -> None:
        """Points can't be taken back there: the curve goes on from an earlier sample."""

    def close(self) -> None:
        """See `Logger.close`."""
        self._client.set_terminated(self._id)


def open_asides(folder: Path, config: TrainConfig, tell: Callable[[str], None]) -> list[Logger]:
    """Those that the settings ask for; `tell` gets a line if one fails."""
    settings, loggers = config.monitoring, list[Logger]()
    if settings.wandb_project is not None:
        loggers.append(Aside("W&B", lambda: WeightsAndBiases(folder, config), tell))
    if settings.mlflow_uri is not None:
        loggers.append(Aside("MLflow", lambda: MLflow(folder, config), tell))
    return loggers


def _known(values: Mapping[str, float]) -> dict[str, float]:
    """Without NaN."""
    return {name: value for name, value in values.items() if value == value}


def _flattened(config: TrainConfig) -> list[tuple[str, str]]:
    tree = config.model_dump(mode="json")
    return [
        (f"{section}.{key}", str(value))
        for section, settings in tree.items()
        if isinstance(settings, dict)
        for key, value in settings.items()
    ]
