"""The config tree of a run. Parts that configure a lower layer live there, next to its code."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from asynception.config_failure import FailureConfig as FailureConfig
from asynception.config_inputs import DataConfig, ModelConfig
from asynception.config_scaling import ScalingConfig, spelled
from asynception.monitoring.settings import MonitoringSettings
from model.settings import Settings
from ps.client import RetryPolicy
from ps.consistency import AllReduce, Async, Averaging, Bounded, Elastic, Policy, Sync
from ps.lanes.lane import LaneSettings
from ps.rules import Ema, Momentum, Rule
from ps.schedule import Exponential, Schedule
from ps.tls import SecuritySettings
from ps.wire import WireSettings
from worker.compute import ComputeSettings
from worker.pipeline import PipelineSettings


class TrainingConfig(Settings):
    objective: Literal["multilabel", "softmax"] = "multilabel"
    """multilabel: sigmoid cross-entropy, summed over classes; softmax: cross-entropy."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For softmax only."""
    label_weights: str | None = None
    """For multilabel only: a text file with a line `class,weight` for each class, like 17,0.25.
    Each class's term of the loss is multiplied by its weight. Blank lines and # comments are
    skipped. Every worker reads it, as it does the images."""
    epochs: PositiveFloat | None = None
    """Passes over the training set, all workers together; give this or `samples`."""
    samples: PositiveInt | None = None
    """Images to train on, all workers together; rounded up to whole batches."""
    max_s: PositiveFloat | None = None
    """Seconds from the first lease of data, after which there are no more: workers finish what they
    have, and the run ends as it does after its last sample."""
    accumulate_grad_batches: PositiveInt = 1
    """Batches behind each push, whose gradients are averaged by samples: for a larger batch than
    memory has room for. Averaging and elastic have consistency.local_steps instead."""
    clip_norm: PositiveFloat | None = None
    """Each worker scales gradients of a larger global norm down to it."""
    seed: NonNegativeInt = 0
    """Determines initial parameters, order of images and augmentation."""
    max_not_finite: NonNegativeInt = 20
    """Gradients with NaN or Inf that are dropped before the run stops as diverged."""
    on_divergence: Literal["warn", "stop", "rollback"] = "warn"
    """When the loss has lost half of what had been gained on it. warn: say so, and go on; stop: end
    the run, whose newest checkpoint is then the last one from before; rollback: begin again from
    that one with a lower learning rate, also after too many gradients with NaN or Inf."""
    rollback_lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What each rollback multiplies the learning rate by."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks before the run stops as diverged."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.epochs is None) == (self.samples is None):
            raise ValueError(
                "give exactly one of training.epochs and training.samples; "
                "with --training.epochs none, samples can be given in place of a recipe's epochs"
            )
        if self.label_smoothing and self.objective == "multilabel":
            raise ValueError(
                "training.label_smoothing has no effect with objective multilabel; remove it"
            )
        if self.label_weights is not None and self.objective == "softmax":
            raise ValueError(
                f"training.label_weights = {self.label_weights!r} has no effect with objective "
                "softmax; remove it or choose multilabel"
            )
        return self


class EvaluationConfig(Settings):
    every_epochs: PositiveFloat = 1.0
    """Epochs between evaluations of the EMA on held-out images."""
    batch_size: PositiveInt = 64
    """Images of one forward pass."""
    raw: bool = False
    """Evaluate the raw parameters, too: as raw_loss, raw_map@100 and so on. Takes twice as long."""
    map_k: PositiveInt = 100
    """k of MAP@k, for multilabel."""
    class_weights: str | None = None
    """Weights of MAP@k: a text file of lines `class,weight`, like 17,0.25; a class without a line
    weighs 0. Blank lines and # comments are skipped. Without it all classes weigh the same."""
    classes: str | None = None
    """The only classes that MAP@k ranks and counts: a text file with a class id a line. Blank
    lines and # comments are skipped. Without it all classes count."""
    cpus: Annotated[float, Field(ge=0)] = 0.0
    """Ray CPUs that the evaluator reserves."""


class RunConfig(Settings):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Name of the run and of its folder; without it, the recipe's name and the time."""
    storage_path: str = "runs"
    """Folder that holds the runs."""
    log_every_s: PositiveFloat = 10.0
    """Seconds between log lines and points of the curves."""
    detached: bool = False
    """Train in an actor of the cluster at ray.address, which goes on when the process that started
    it ends; `asynception attach` and `stop` find it by run.name."""
    placement_timeout_s: PositiveFloat = 60.0
    """How long to wait for the cluster to have room, at the start, or when no worker is left."""


class CheckpointConfig(Settings):
    path: str | None = None
    """Folder, or URL that fsspec can write, like s3://bucket/folder, with a folder for each run;
    the run's own folder unless given. The trainer writes there; a URL's checkpoints are made in the
    run's folder first."""
    storage_options: dict[str, Any] = Field(default={})
    """Options of the fsspec driver, like {endpoint_url = "http://..."} for s3. They are kept with
    the run: leave secrets to the driver's own files and variables."""
    num_to_keep: PositiveInt | None = 2
    """Newest checkpoints to keep; none keeps all."""
    every_epochs: PositiveFloat | None = None
    """Epochs between checkpoints."""
    every_s: PositiveFloat | None = 60.0
    """Seconds between checkpoints. One is also written at the end."""


class RayConfig(Settings):
    address: str | None = None
    """Cluster to join ("auto" or HOST:PORT); without it a local Ray is started and shut
    down again."""


class TrainConfig(Settings):
    """All of a run; a recipe is one of these as TOML."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    training: TrainingConfig
    optimizer: Rule = Momentum()
    schedule: Schedule = Exponential(lr=0.045)
    ema: Ema = Ema()
    consistency: Policy = Async()
    compute: ComputeSettings = ComputeSettings()
    evaluation: EvaluationConfig = EvaluationConfig()
    scaling: ScalingConfig = ScalingConfig()
    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    failure: FailureConfig = FailureConfig()
    network: RetryPolicy = RetryPolicy()
    lanes: LaneSettings = LaneSettings()
    pipeline: PipelineSettings = PipelineSettings()
    wire: WireSettings = WireSettings()
    security: SecuritySettings = SecuritySettings()
    ray: RayConfig = RayConfig()
    monitoring: MonitoringSettings = MonitoringSettings()

    @property
    def trains_locally(self) -> bool:
        """Whether workers have optimizers of their own."""
        return isinstance(self.consistency, Averaging | Elastic)

    @property
    def reduces(self) -> bool:
        """Whether workers average gradients among themselves, and only publish to the servers."""
        return isinstance(self.consistency, AllReduce)

    @property
    def takes_joins(self) -> bool:
        """Whether workers may join and leave for good: no update depends on their number."""
        return isinstance(self.consistency, Async | Bounded | Elastic)

    @property
    def servers_may_move(self) -> bool:
        """Whether another server can be kept in step with one, to go on in its place."""
        return not (self.reduces or self.consistency.compensation)

    @property
    def batches_per_push(self) -> int | None:
        """Batches behind each push of a worker; None for all of a worker's."""
        per_process = self.batches_per_process
        return per_process and per_process * self.scaling.processes_per_worker

    @property
    def batches_per_process(self) -> int | None:
        """Of these, the batches that each of a worker's processes works on."""
        if self.trains_locally:
            return self.consistency.batches_per_push
        return self.training.accumulate_grad_batches

    @property
    def server_rule(self) -> Rule:
        """The servers' optimizer, which is not the workers' if these train by themselves."""
        return self.consistency.server_rule(self.optimizer, self.scaling.max_workers)

    @model_validator(mode="after")
    def _outlives_its_ray(self) -> Self:
        if self.run.detached and self.ray.address is None:
            raise ValueError(
                "run.detached = true needs a cluster that outlives this process: set ray.address "
                "to auto or HOST:PORT of one that runs (ray start --head), or run.detached to false"
            )
        return self

    @model_validator(mode="after")
    def _standbys_can_follow(self) -> Self:
        policy, given = self.consistency, "scaling.replicas = 1"
        if self.scaling.replicas == 0:
            return self
        if self.reduces:
            raise ValueError(
                f'{given} has no effect with consistency.mode = "allreduce", where servers only '
                "hold what workers publish: set it to 0"
            )
        if policy.compensation:
            raise ValueError(
                f"{given} with consistency.delay_compensation = {policy.compensation:g}: a standby "
                "lacks the versions that workers pulled, to correct by them: remove one"
            )
        return self

    @model_validator(mode="after")
    def _someone_is_waited_for(self) -> Self:
        policy, num_workers = self.consistency, self.scaling.max_workers
        if isinstance(policy, Sync) and policy.backup_workers >= num_workers:
            raise ValueError(
                f"consistency.backup_workers = {policy.backup_workers} leaves none of "
                f"scaling.num_workers = {num_workers} whose gradient is waited for: make it less"
            )
        return self

    @model_validator(mode="after")
    def _count_may_change(self) -> Self:
        if not self.scaling.is_range:
            return self
        given = f"scaling.num_workers = {spelled(self.scaling.num_workers)}"
        if not self.takes_joins:
            raise ValueError(
                f'{given} with consistency.mode = "{self.consistency.mode}": the number of workers '
                "says how much work makes an update there, so it may not change: give one number, "
                "or choose async, bounded or elastic"
            )
        if self.schedule.unit == "worker_samples":
            raise ValueError(
                f'schedule.unit = "worker_samples" counts the share of one of the workers, and '
                f"with {given} there is no such share: count in samples or epochs"
            )
        return self

    @model_validator(mode="after")
    def _port_is_of_its_own_ray(self) -> Self:
        if self.monitoring.port is not None and self.ray.address is not None:
            raise ValueError(
                f"monitoring.port = {self.monitoring.port} has no effect with ray.address = "
                f'"{self.ray.address}": the cluster\'s nodes export at the port that '
                "`ray start --metrics-export-port` said; remove one"
            )
        return self

    @model_validator(mode="after")
    def _centre_is_stable(self) -> Self:
        policy, num_workers = self.consistency, self.scaling.max_workers
        if not isinstance(policy, Elastic):
            return self
        product = policy.rate(num_workers) * num_workers
        if product >= 1:
            raise ValueError(
                f"consistency.moving_rate = {policy.moving_rate} with scaling.num_workers = "
                f"{num_workers}: those who push at once would move the centre {product:g} times "
                "the way to their mean, and from 1 on it may swing higher and higher: set it to "
                f"less than {1 / num_workers:g}, or to none for {0.9 / num_workers:g}"
            )
        return self

    @model_validator(mode="after")
    def _all_reduce_is_in_the_clear(self) -> Self:
        if self.security.tls != "off" and self.reduces:
            raise ValueError(
                f'security.tls = "{self.security.tls}" would not cover what workers send each other'
                ' with consistency.mode = "allreduce" (gloo and NCCL encrypt nothing): set it to'
                ' "off", or choose another mode'
            )
        return self

    @model_validator(mode="after")
    def _accumulates_gradients(self) -> Self:
        batches = self.training.accumulate_grad_batches
        if (self.trains_locally or self.reduces) and batches > 1:
            raise ValueError(
                f"training.accumulate_grad_batches = {batches} has no effect with "
                f'consistency.mode = "{self.consistency.mode}", where workers step at every batch: '
                "set a larger data.batch_size, or consistency.local_steps if the mode has it"
            )
        return self

    @model_validator(mode="after")
    def _processes_make_gradients(self) -> Self:
        num_processes = self.scaling.processes_per_worker
        if num_processes == 1:
            return self
        given = f"scaling.processes_per_worker = {num_processes}"
        if self.trains_locally:
            raise ValueError(
                f'{given} sums up gradients, and with consistency.mode = "{self.consistency.mode}" '
                "workers step by themselves and push none: set it to 1, or choose async, bounded "
                "or sync"
            )
        if self.reduces:
            raise ValueError(
                f'{given} has no effect with consistency.mode = "allreduce", where every process '
                f"is a worker: set it to 1, and scaling.num_workers to {num_processes} times as "
                "many"
            )
        if self.pipeline.early_push:
            raise ValueError(
                f"pipeline.early_push = true pushes parts of a gradient before the sum over "
                f"{given} is known: remove one"
            )
        return self

    @model_validator(mode="after")
    def _pipeline_fits(self) -> Self:
        if self.pipeline.overlap and self.consistency.max_lead == 0:
            raise ValueError(
                "pipeline.overlap = true pulls before the last push is settled, and workers with "
                "consistency.slack = 0 go in step: set slack to 1 or more, or overlap to false"
            )
        waits = self.consistency.waits or self.trains_locally or self.reduces
        for name, value in self.pipeline:
            if value and waits:
                raise ValueError(
                    f"pipeline.{name} = true would have nothing to run beside with "
                    f'consistency.mode = "{self.consistency.mode}", where workers wait for one '
                    'another or push seldom: set it to false, or the mode to "async"'
                )
        return self

    @model_validator(mode="after")
    def _parts_can_leave_early(self) -> Self:
        training = self.training
        if not self.pipeline.early_push:
            return self
        for name, needs in (
            ("clip_norm", training.clip_norm is not None),
            ("accumulate_grad_batches", training.accumulate_grad_batches > 1),
        ):
            if needs:
                raise ValueError(
                    f"pipeline.early_push = true pushes parts of a gradient before the whole is "
                    f"known, which training.{name} = {getattr(training, name)} needs: remove one"
                )
        return self
