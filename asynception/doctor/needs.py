"""What a recipe asks of the machines that it is to run on."""

from collections.abc import Mapping
from dataclasses import dataclass

from asynception.building import open_train
from asynception.config import TrainConfig
from asynception.config_scaling import spelled
from asynception.doctor.finding import Verdict, ok
from asynception.plan import BYTES_PER_ELEMENT, ModelPlan, plan_model
from worker.data.summary import summarize

PROCESS_NUM_BYTES = 350_000_000
"""What a process takes before it holds a vector: Python, torch and Ray's core."""

THREADS_PER_PROCESS = 64
"""Of Ray's core, gRPC and torch, and those that this program starts; about 20 are Ray's."""


@dataclass(frozen=True)
class Needs:
    """A recipe and the figures that `asynception info` derives from it."""

    config: TrainConfig
    server_num_bytes: tuple[int, ...]
    """Vectors of each server, at most."""
    process_num_bytes: int
    """Vectors of each process of a worker, and of the evaluator; activations and images come on
    top."""
    pull_num_bytes: int
    push_num_bytes: int
    checkpoint_num_bytes: int

    @property
    def num_processes(self) -> int:
        """Servers, those of workers, evaluator, coordinator, trainer."""
        return len(self.server_num_bytes) + self.num_worker_processes + 3

    @property
    def num_worker_processes(self) -> int:
        """Of all workers together."""
        scaling = self.config.scaling
        return scaling.max_workers * scaling.processes_per_worker

    @property
    def all_num_bytes(self) -> int:
        """Memory of all processes together, activations and images not counted."""
        vectors = sum(self.server_num_bytes)
        vectors += (1 + self.num_worker_processes) * self.process_num_bytes
        return vectors + self.num_processes * PROCESS_NUM_BYTES

    @property
    def largest_num_bytes(self) -> int:
        """Memory of the largest server or worker, which some node must have room for."""
        num_processes = self.config.scaling.processes_per_worker
        worker = num_processes * (self.process_num_bytes + PROCESS_NUM_BYTES)
        return max(*(each + PROCESS_NUM_BYTES for each in self.server_num_bytes), worker)

    @property
    def resources(self) -> Mapping[str, float]:
        """All that a run reserves of Ray: the same as its placement group."""
        scaling = self.config.scaling
        process = {"memory": float(self.process_num_bytes)}
        worker = {"memory": scaling.processes_per_worker * float(self.process_num_bytes)}
        bundles: list[Mapping[str, float]] = [
            *(
                {"memory": float(each), **scaling.resources_per_server}
                for each in self.server_num_bytes
            ),
            {**process, "CPU": self.config.evaluation.cpus},
            *[{**worker, **scaling.worker_resources}] * scaling.min_workers,
        ]
        names = dict.fromkeys(name for bundle in bundles for name in bundle)
        total = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}
        return {name: amount for name, amount in total.items() if amount}


def derive_needs(config: TrainConfig) -> Needs:
    """Opens the training set only if the recipe doesn't give its classes. Raises InputError."""
    num_classes = config.data.num_classes
    if num_classes is None:
        num_classes = summarize(open_train(config), None).num_classes
    plan = plan_model(config, num_classes)
    return Needs(
        config,
        tuple(plan.server_num_bytes(shard) for shard in range(len(plan.layout.shards))),
        plan.process_num_bytes(),
        plan.pull_num_bytes,
        plan.push_num_bytes,
        _checkpoint_num_bytes(plan),
    )


def _checkpoint_num_bytes(plan: ModelPlan) -> int:
    """Parameters, statistics, the EMA of both, and the rule's slots."""
    layout, num_slots = plan.layout, len(plan.config.server_rule.slots)
    averages = 2 * (layout.num_parameters + layout.num_statistics)
    return BYTES_PER_ELEMENT * (averages + num_slots * layout.num_parameters)


def judge_needs(needs: Needs) -> Verdict:
    """That a recipe's model can be built is all that it takes."""
    scaling = needs.config.scaling
    pull, push, checkpoint = (
        f"{num_bytes / 1e6:,.1f} MB"
        for num_bytes in (needs.pull_num_bytes, needs.push_num_bytes, needs.checkpoint_num_bytes)
    )
    servers = f"{scaling.num_servers} server{'s' if scaling.num_servers > 1 else ''}"
    return ok(
        f"{needs.config.model.title}, {spelled(scaling.num_workers)} workers, {servers}; a pull"
        f" moves {pull}, a push {push}, and a checkpoint takes {checkpoint}"
    )
