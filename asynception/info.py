"""What a recipe will take, before anything is started."""

from collections.abc import Iterator

from asynception.config import TrainConfig
from asynception.plan import BYTES_PER_ELEMENT, ModelPlan, open_train, plan_model
from worker.data.summary import summarize


def describe(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """(what, how much) of a run, line by line. Raises InputError.

    Opens the training set only if the recipe doesn't give `data.num_classes`.
    """
    num_classes = config.data.num_classes
    if num_classes is None:
        num_classes = summarize(open_train(config), None).num_classes
    plan = plan_model(config, num_classes)
    yield "model", f"{config.model.name}, {num_classes} classes, {config.data.image_size} pixels"
    yield "parameters", f"{plan.num_parameters:,}"
    statistics = sum(segment.numel for segment in plan.tensors.statistics)
    yield "BN statistics", f"{statistics:,}"
    yield "bytes of a pull or a push", _mb(plan.num_bytes)
    yield from _shards(plan)
    workers = config.scaling.num_workers
    yield (
        f"each of {workers} workers",
        f"{_mb(plan.worker_num_bytes())} for vectors, activations and images not counted",
    )


def _shards(plan: ModelPlan) -> Iterator[tuple[str, str]]:
    for shard, ranges in enumerate(plan.layout.shards):
        size = _mb(BYTES_PER_ELEMENT * ranges.numel)
        most = _mb(plan.server_num_bytes(shard))
        yield f"shard {shard}", f"{ranges.numel:,} elements, {size}; at most {most} for vectors"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
