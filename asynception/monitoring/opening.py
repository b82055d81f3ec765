"""The monitor of a run, as its settings ask for."""

from pathlib import Path

import ray

from asynception.monitoring.monitor import Metrics, Monitor
from asynception.plan import RunPlan


def open_monitor(plan: RunPlan, folder: Path) -> Monitor:
    """Ray, if it is to have the run's metrics, must be initialised."""
    return Monitor(folder, plan.config, plan.total_samples, _metrics(plan))


def _metrics(plan: RunPlan) -> Metrics | None:
    config = plan.config
    if not (config.monitoring.prometheus and ray.is_initialized()):
        return None
    from asynception.monitoring.ray_metrics import RayMetrics

    return RayMetrics(plan)
