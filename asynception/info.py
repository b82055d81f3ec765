"""What a recipe will take, before anything is started."""

from collections.abc import Iterator
from functools import partial

from asynception.building import open_train
from asynception.config import TrainConfig
from asynception.config_scaling import spelled
from asynception.plan import BYTES_PER_ELEMENT, ModelPlan, plan_model
from asynception.sizing import describe_traffic
from model.cost import measure_cost
from model.registry import create_model, input_size, model_names
from ps.schedule import Clocks, Horizon
from worker.data.summary import summarize

EPOCHS_SHOWN = (0, 10, 50, 100)
SAMPLES_SHOWN = (0, 30_000_000, 350_000_000)


def describe(
    config: TrainConfig, step_s: float | None = None, network_gbit: float = 10.0
) -> Iterator[tuple[str, str]]:
    """(what, how much) of a run, line by line. Raises InputError.

    With `step_s`, the seconds of one gradient, also what the servers then have to do.
    Opens the training set only if the recipe doesn't give `data.num_classes`.
    """
    num_classes = config.data.num_classes
    if num_classes is None:
        num_classes = summarize(open_train(config), None).num_classes
    plan = plan_model(config, num_classes)
    yield "model", f"{config.model.title}, {num_classes} classes, {config.data.image_size} pixels"
    yield "parameters", f"{plan.num_parameters:,}"
    statistics = sum(segment.numel for segment in plan.tensors.statistics)
    yield "BN statistics", f"{statistics:,}"
    yield "bytes of a pull", _mb(plan.pull_num_bytes)
    yield "bytes of a push", _mb(plan.push_num_bytes)
    yield (
        "parameter buffers of a shard",
        f"at most {plan.max_buffers}: the newest version, the next one, and what workers read",
    )
    yield from _shards(plan)
    yield (
        f"each of {spelled(config.scaling.num_workers)} workers",
        f"{_processes(config.scaling.processes_per_worker)}{_mb(plan.worker_num_bytes())} for "
        "vectors, activations and images not counted",
    )
    if step_s is not None:
        yield from describe_traffic(plan, step_s, network_gbit)
    yield from _learning_rates(config)


def describe_models(num_classes: int, image_size: int | None) -> Iterator[tuple[str, ...]]:
    """A header, then a row for each registered model, at `image_size` or its own.

    Raises InputError for a size that is too small for one of them.
    """
    yield ("model", "pixels", "parameters", "MACs", "activations", "bytes on the wire")
    for name in model_names():
        size = image_size or input_size(name)
        cost = measure_cost(partial(create_model, name, num_classes), size)
        yield (
            name,
            str(size),
            f"{cost.num_parameters:,}",
            f"{cost.num_macs / 1e9:,.3f} G",
            _mb(cost.num_activation_bytes),
            _mb(cost.num_wire_bytes),
        )


def _shards(plan: ModelPlan) -> Iterator[tuple[str, str]]:
    for shard, ranges in enumerate(plan.layout.shards):
        size = _mb(BYTES_PER_ELEMENT * ranges.numel)
        most = _mb(plan.server_num_bytes(shard))
        yield f"shard {shard}", f"{ranges.numel:,} elements, {size}; at most {most} for vectors"


def _learning_rates(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """At points of a long run, which shows a decay that is counted in the wrong unit."""
    schedule, num_workers = config.schedule, config.scaling.max_workers
    # An epoch of one sample: the schedule then needs no training set.
    horizon = Horizon(epoch_samples=1, num_workers=num_workers)
    if schedule.unit == "epochs":
        for epoch in EPOCHS_SHOWN:
            rate = schedule.rate(Clocks(samples=epoch), horizon)
            yield f"learning rate at epoch {epoch}", f"{rate:.3g}"
        return
    for samples in SAMPLES_SHOWN:
        clocks = Clocks(samples // config.data.batch_size, samples)
        rates = {
            unit: schedule.model_copy(update={"unit": unit}).rate(clocks, horizon)
            for unit in dict.fromkeys((schedule.unit, "samples"))
        }
        shown = [f"{rate:.3g} with unit = {unit}" for unit, rate in rates.items()]
        yield f"learning rate at {samples:,} samples", ", ".join(shown)


def _processes(number: int) -> str:
    return f"{number} processes on one node, one push for all; " if number > 1 else ""


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
