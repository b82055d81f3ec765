"""Every setting that recipes may hold, and recipes as trees and as files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from model.errors import InputError
from model.registry import model_setting_names

PINNED = """
model.name model.factory model.weights
data.train data.val data.num_classes data.image_size data.batch_size data.shuffle_window
data.resize.mode data.resize.crop_fraction data.augment.horizontal_flip data.augment.max_shift
data.augment.crop data.augment.crop_area data.augment.crop_ratio data.augment.brightness
data.augment.contrast data.augment.saturation data.augment.hue data.max_corrupt
data.max_lost_shards data.max_pixels data.fetch.cache_dir data.fetch.cache_gb data.fetch.timeout_s
data.fetch.stall_s data.fetch.attempts data.fetch.backoff_s data.fetch.retry_lost_s
data.fetch.num_threads data.fetch.verify data.fetch.storage_options data.cached_shards
data.cache_images_mb data.num_threads data.prefetch_batches data.lease data.lease_batches
training.objective training.label_smoothing training.label_weights training.epochs
training.samples training.max_s training.accumulate_grad_batches training.clip_norm training.seed
training.max_not_finite training.on_divergence training.rollback_lr_factor
training.max_rollbacks
optimizer.weight_decay optimizer.name optimizer.momentum optimizer.nesterov optimizer.rho
optimizer.epsilon optimizer.betas
schedule.lr schedule.unit schedule.warmup schedule.kind schedule.decay schedule.every
schedule.staircase schedule.length schedule.final
ema.decay ema.warmup
consistency.mode consistency.staleness_lr consistency.delay_compensation
consistency.max_staleness consistency.ramp_up_epochs consistency.slack
consistency.backup_workers consistency.deterministic consistency.local_steps
consistency.outer_lr consistency.outer_momentum consistency.asynchronous consistency.moving_rate
consistency.publish_every_s consistency.timeout_s consistency.bucket_mb
consistency.find_unused_parameters
compute.channels_last compute.precision compute.compile
evaluation.every_epochs evaluation.batch_size evaluation.raw evaluation.map_k
evaluation.class_weights evaluation.classes evaluation.cpus
scaling.num_workers scaling.processes_per_worker scaling.num_servers scaling.replicas
scaling.use_gpu scaling.resources_per_worker scaling.resources_per_server scaling.placement_strategy
scaling.spread_servers scaling.slow_workers
run.name run.storage_path run.log_every_s run.detached run.placement_timeout_s
checkpoint.path checkpoint.storage_options checkpoint.num_to_keep checkpoint.every_epochs
checkpoint.every_s
failure.max_failures failure.salvage_s failure.server_timeout_s failure.max_worker_failures
failure.max_fruitless_failures failure.worker_timeout_s
network.attempt_s network.deadline_s network.backoff_s
lanes.choice lanes.port_range
pipeline.overlap pipeline.early_push
wire.pull wire.push wire.error_feedback
security.tls security.authority_file security.certificate_file security.key_file
ray.address
monitoring.prometheus monitoring.port monitoring.wandb_project monitoring.mlflow_uri
monitoring.mlflow_experiment
"""
KNOWN_KEYS = PINNED.split()
"""The settings that recipes out there may hold: renaming or removing one breaks them."""


SMALLEST = {"data": {"train": "/a", "val": "/b"}, "training": {"epochs": 1}}

COMPLETE = {
    **SMALLEST,
    "optimizer": {"name": "rmsprop"},
    "schedule": {"kind": "exponential", "lr": 0.1},
}
"""With sections of which one setting decides which others there are."""


MEMBERS = {
    "schedule.length": {"kind": "cosine", "length": 1.0, "lr": 0.1},
    "schedule.final": {"kind": "cosine", "length": 1.0, "lr": 0.1},
    "consistency.slack": {"mode": "bounded"},
    "consistency.backup_workers": {"mode": "sync"},
    "consistency.deterministic": {"mode": "sync"},
    "consistency.local_steps": {"mode": "averaging"},
    "consistency.outer_lr": {"mode": "averaging"},
    "consistency.outer_momentum": {"mode": "averaging"},
    "consistency.asynchronous": {"mode": "averaging"},
    "consistency.moving_rate": {"mode": "elastic"},
    "consistency.publish_every_s": {"mode": "allreduce"},
    "consistency.timeout_s": {"mode": "allreduce"},
    "consistency.bucket_mb": {"mode": "allreduce"},
    "consistency.find_unused_parameters": {"mode": "allreduce"},
    "optimizer.nesterov": {"name": "momentum"},
    "optimizer.betas": {"name": "adam"},
}


def around(key: str) -> dict[str, Any]:
    """A complete recipe in which `key` may be set."""
    tree = copy.deepcopy(COMPLETE)
    if key in MEMBERS:
        tree[key.partition(".")[0]] = dict(MEMBERS[key])
    return tree


def with_key(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *sections, leaf = key.split(".")
    inner = tree = copy.deepcopy(tree)
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[leaf] = value
    return tree


def write(folder: Path, tree: dict[str, Any], name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_bytes(tomli_w.dumps(tree).encode())
    return path


def message(call: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def own_keys() -> list[str]:
    return [f"model.{name}" for name in model_setting_names()]
