"""Which kind of supervisor keeps a run's workers going."""

from asynception.config import TrainConfig
from asynception.node_workers import NodeSupervisor
from asynception.ranks import GroupSupervisor
from asynception.supervisor import Supervisor


def supervisor_kind(config: TrainConfig) -> type[Supervisor]:
    """By who has to be with whom."""
    if config.reduces:
        return GroupSupervisor
    return NodeSupervisor if config.scaling.processes_per_worker > 1 else Supervisor
