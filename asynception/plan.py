"""What a run will consist of, worked out from its config and data before anything starts."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from asynception.building import (
    build_flat,
    build_map_definition,
    build_objective,
    open_train,
    open_val,
    train_order,
)
from asynception.config import TrainConfig
from asynception.ledger import BatchLeases, LeaseEnd, WindowLeases
from model.errors import InputError
from model.flat import FlatModule, parameter_segments, statistic_segments
from model.weights import load_weights
from ps.checkpoint import ModelLayout
from ps.client import ModelState
from ps.layout import Layout, plan_layout
from ps.replica import MAX_BACKLOG
from ps.schedule import Horizon
from ps.shard import ShardConfig, initial_state, vector_names
from ps.snapshot import max_buffers
from worker.data.labels import LabelLists
from worker.data.source import ImageSource, iterate_labels
from worker.data.summary import DataSummary, summarize
from worker.metrics import frequency_baseline
from worker.objective import single_labels

BYTES_PER_ELEMENT = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelPlan:
    """A model's place in the flat vectors and on the shards; needs no data."""

    config: TrainConfig
    num_classes: int
    tensors: ModelLayout
    layout: Layout

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, padding excluded."""
        return sum(segment.numel for segment in self.tensors.parameters)

    @property
    def pull_num_bytes(self) -> int:
        """Bytes of one pull: all parameters, and BN statistics in float32."""
        return self._wire_num_bytes(self.config.wire.pull_dtype)

    @property
    def push_num_bytes(self) -> int:
        """Bytes of one push: all gradients, and BN statistics' deltas in float32."""
        return self._wire_num_bytes(self.config.wire.push_dtype)

    def _wire_num_bytes(self, dtype: torch.dtype) -> int:
        parameters = dtype.itemsize * self.layout.num_parameters
        return parameters + BYTES_PER_ELEMENT * self.layout.num_statistics

    @property
    def max_buffers(self) -> int:
        """Copies of its parameters that a server holds at most, if each worker reads one."""
        num_workers = self.config.scaling.max_workers
        return max_buffers(num_workers, self.config.consistency.kept_versions(num_workers))

    def server_num_bytes(self, shard: int) -> int:
        """Memory that a server takes for vectors at most.

        The state, its copies for a checkpoint (sent by the trainer at a resume, or cut) and for
        an evaluation, for each worker one buffer that it reads and one that it writes, and what
        gradients are summed in, and what the policy keeps of what workers pulled. With a standby
        also an image of all of it, and the operations that are kept while that travels.
        """
        ranges, num_workers = self.layout.shards[shard], self.config.scaling.max_workers
        averages = 2 * ranges.numel
        slots = len(self.config.server_rule.slots) * ranges.parameters.numel
        state = averages + slots
        policy = self.config.consistency
        buffers = (self.max_buffers - 1) * ranges.numel  # the newest one is in the state
        staging = (1 + num_workers) * ranges.numel
        gathering = policy.num_sums(num_workers) * ranges.numel
        image = state + gathering + (1 + (policy.max_lead == 0) + MAX_BACKLOG) * ranges.numel
        replicas = self.config.scaling.replicas * image
        return BYTES_PER_ELEMENT * (
            2 * state + ranges.numel + buffers + staging + gathering + replicas
        )

    def worker_num_bytes(self) -> int:
        """Memory that a worker takes for vectors, all its processes together."""
        return self.config.scaling.processes_per_worker * self.process_num_bytes()

    def process_num_bytes(self) -> int:
        """Of one process of a worker, the first: parameters, gradients, and BN statistics.

        With local steps also for its optimizer's slots, what was pulled, and two more vectors; with
        overlap for a second gradient, and for parameters that arrive meanwhile; for bfloat16 pushes
        what is sent, and with error feedback what rounding left, twice. With all-reduce for slots,
        the next parameters, DDP's buckets, the averages, and a state that is published.
        """
        layout, config = self.layout, self.config
        pairs = 2 if config.pipeline.overlap else 1
        numel = 2 * pairs * (layout.num_parameters + layout.num_statistics)
        if config.trains_locally:
            numel += (3 + len(config.optimizer.slots)) * layout.num_parameters
            numel += layout.num_statistics
        if config.reduces:
            slots = len(config.optimizer.slots)
            numel += (2 * slots + 5) * layout.num_parameters + 4 * layout.num_statistics
        cast = 2 if config.wire.push == "bfloat16" else 0
        residuals = 2 * BYTES_PER_ELEMENT if config.wire.error_feedback else 0
        return BYTES_PER_ELEMENT * numel + (cast + residuals) * layout.num_parameters


def plan_model(config: TrainConfig, num_classes: int) -> ModelPlan:
    """Raises InputError for a model that can't be built, or can't be cut into the shards."""
    module = config.model.build_shape(num_classes)
    _probe(module, config.data.image_size, num_classes)
    tensors = ModelLayout(parameter_segments(module), statistic_segments(module))
    layout = plan_layout(tensors.parameters, tensors.statistics, config.scaling.num_servers)
    return ModelPlan(config, num_classes, tensors, layout)


def _probe(module: nn.Module, image_size: int, num_classes: int) -> None:
    """A forward pass: what the model can't take, or doesn't give, shows before the start.

    A model without values gets memory nobody has written to: for a pass on the meta device torch
    imports its compiler, which takes longer than the pass.
    """
    device = next((parameter.device for parameter in module.parameters()), None)
    if device is None:
        raise InputError("the model has no parameters, so there is nothing to train")
    if device.type == "meta":
        device = torch.device("cpu")
        state = module.state_dict().items()
        empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in state}
        module.load_state_dict(empty, assign=True)
    images = torch.zeros(1, 3, image_size, image_size, device=device)
    try:
        with torch.no_grad():
            logits = module.eval()(images)
    except InputError:
        raise
    except Exception as error:  # of a user's own model, which may raise anything
        raise InputError(
            f"the model can't take an image of {image_size}x{image_size} pixels "
            f"({type(error).__name__}: {error}): mend it, or change data.image_size"
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        raise InputError(
            f"the model returned {shape} for one image, where logits of shape (1, {num_classes})"
            " are needed: let it return those alone (auxiliary outputs switched off)"
        )


@dataclass(frozen=True)
class RunPlan:
    """All that is fixed before a run starts."""

    model: ModelPlan
    train: DataSummary
    num_val_samples: int
    total_samples: int
    """Samples of the run, a whole number of batches."""
    baseline: Mapping[str, float]
    """The evaluation's measures for predicting each label's training frequency."""
    lease_end: LeaseEnd
    """Where leases end."""

    @property
    def config(self) -> TrainConfig:
        return self.model.config

    @property
    def horizon(self) -> Horizon:
        return Horizon(
            epoch_samples=self.train.num_samples, num_workers=self.config.scaling.max_workers
        )

    def shard_config(self, shard: int) -> ShardConfig:
        """What the server of a shard is told."""
        config = self.config
        return ShardConfig(
            self.model.layout.shards[shard],
            config.server_rule,
            config.schedule,
            self.horizon,
            config.ema,
            config.consistency,
        )

    def samples_of(self, epochs: float) -> int:
        """Samples in a number of epochs, at least one."""
        return max(1, round(epochs * self.train.num_samples))

    @property
    def publish_marks(self) -> list[int]:
        """Samples at whose multiples an evaluation or a checkpoint is due."""
        config = self.model.config
        every_epochs = (config.evaluation.every_epochs, config.checkpoint.every_epochs)
        return [self.samples_of(epochs) for epochs in every_epochs if epochs]


def plan_run(config: TrainConfig) -> RunPlan:
    """Read what there is of the data, and check that everything fits together.

    Raises InputError.
    """
    train = open_train(config)
    summary = summarize(train, config.data.num_classes)
    val = open_val(config)
    val_summary = summarize(val, summary.num_classes)
    model = plan_model(config, summary.num_classes)
    objective = build_objective(config, summary.num_classes)
    if objective.name == "softmax":
        _check_single_labels(train)
    labels = list(iterate_labels(val))
    definition = build_map_definition(config, summary.num_classes)
    baseline = frequency_baseline(
        objective, summary.label_counts, summary.num_samples, labels, definition
    )
    total = _total_samples(config, summary.num_samples)
    lease_end = _lease_end(config, train)
    return RunPlan(model, summary, val_summary.num_samples, total, baseline, lease_end)


_WINDOWS_PER_WORKER = 4
"""With fewer in an epoch, too much of it would hang on the worker that got the last one."""


def _lease_end(config: TrainConfig, train: ImageSource) -> LeaseEnd:
    data = config.data
    order = train_order(config, train)
    enough = order.num_windows(epoch=0) >= _WINDOWS_PER_WORKER * config.scaling.max_workers
    if data.lease == "window" or (data.lease == "auto" and train.fetches and enough):
        return WindowLeases(order)
    return BatchLeases(data.batch_size, data.lease_batches)


def _check_single_labels(train: ImageSource) -> None:
    known = train.known_labels
    if known is None:
        single_labels(LabelLists.from_lists(iterate_labels(train)))
    elif (known.fewest, known.most) != (1, 1):
        raise InputError(
            f"training.objective = 'softmax' needs one label an image, and the training set has "
            f"images with {known.fewest} and with {known.most}: choose multilabel"
        )


def _total_samples(config: TrainConfig, epoch_samples: int) -> int:
    training, batch_size = config.training, config.data.batch_size
    wanted = training.samples or math.ceil((training.epochs or 0) * epoch_samples)
    return math.ceil(wanted / batch_size) * batch_size


def first_state(plan: ModelPlan) -> ModelState:
    """The state that a new run starts from. Raises InputError for weights that don't fit."""
    flat = build_flat(plan.config, plan.num_classes)
    _load_first_weights(plan.config, flat)
    state = initial_state(plan.config.server_rule, flat.parameters, flat.statistics)
    assert tuple(state.vectors) == vector_names(plan.config.server_rule)
    return ModelState(state.clocks, state.vectors, {})


def check_first_weights(plan: ModelPlan) -> None:
    """Raises InputError if `model.weights` can't be read or isn't of the model."""
    config = plan.config
    if config.model.weights is not None:
        load_weights(config.model.build_shape(plan.num_classes), Path(config.model.weights))


def _load_first_weights(config: TrainConfig, flat: FlatModule) -> None:
    if config.model.weights is None:
        return
    left = load_weights(flat.module, Path(config.model.weights))
    if left:
        _log.warning(
            "model.weights = %s has another number of classes: %s start anew",
            config.model.weights,
            " and ".join(left),
        )
