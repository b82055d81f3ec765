"""Where a run's figures go, besides its folder."""

from importlib.util import find_spec
from typing import Annotated

from pydantic import Field

from model.errors import InputError
from model.settings import Settings

_METRICS_AGENT = "opentelemetry.exporter.prometheus"
"""A module without which Ray's nodes export nothing."""


class MonitoringSettings(Settings):
    """TensorBoard files, metrics.jsonl and status.json are written in any case."""

    prometheus: bool = True
    """Record figures as asynception_* by ray.util.metrics. Ray's nodes export them for Prometheus
    where ray[default] is installed; elsewhere nothing comes of it."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port at which a Ray that the run starts itself exports them, to whoever reaches this machine;
    any free one unless given. That of a cluster is what `ray start --metrics-export-port` said."""
    wandb_project: str | None = None
    """Send curves to this project at Weights & Biases, too. Needs the package wandb."""
    mlflow_uri: str | None = None
    """Send curves to this MLflow tracking server (http://HOST:PORT) or store (sqlite:///FILE), too.
    Needs the package mlflow; for a server, mlflow-skinny is enough."""
    mlflow_experiment: str = "asynception"
    """MLflow's experiment that gets the run."""


def check_packages(settings: MonitoringSettings) -> None:
    """Raises InputError if a package is missing that these settings need."""
    needs = (
        (f"port = {settings.port}", settings.port, _METRICS_AGENT, "'ray[default]'"),
        (f"wandb_project = {settings.wandb_project}", settings.wandb_project, "wandb", "wandb"),
        (f"mlflow_uri = {settings.mlflow_uri}", settings.mlflow_uri, "mlflow", "mlflow"),
    )
    for said, value, module, package in needs:
        if value is not None and not _is_there(module):
            raise InputError(
                f"monitoring.{said} needs a package that is not installed: pip install {package}, "
                "or remove the setting"
            )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # one of its parents
        return False
