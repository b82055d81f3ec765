"""Workers as ranks of one process group: the actor, and what keeps such a group going."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from asynception.actors import LEASE_TIMEOUT_S, Connection, Reports, WorkerProcess
from asynception.building import build_flat, build_objective, open_train, train_loader
from asynception.failures import GroupLost, one_line
from asynception.lost_ranks import errors_among, precedence
from asynception.process_group import Rendezvous, joined, open_store
from asynception.publishing import Publisher, read_published
from asynception.supervisor import Supervisor, cause_of
from model.errors import InputError
from ps.client import ModelState
from ps.consistency import AllReduce
from ps.schedule import Horizon
from worker.allreduce import AllReduceLoop
from worker.gradient import GradientComputer
from worker.replica import Replica

RENDEZVOUS_TIMEOUT_S = 120.0
"""For rank 0's process to start and to open its store."""


@dataclass(frozen=True)
class Group:
    """What each rank is told of its group."""

    rendezvous: Rendezvous
    host: str | None
    """Address for ranks to meet at; None for the address of the node that each is on."""
    incarnations: Sequence[int]
    """Of each rank's life, by rank."""
    horizon: Horizon
    marks: Sequence[int]
    """Samples at whose multiples the state is published."""


def node_host(host: str | None) -> str:
    """`host`, or the address by which Ray knows this node."""
    return host or str(ray.util.get_node_ip_address())


class RankProcess(WorkerProcess):
    """One life of a worker that reduces gradients with the others; its rank is its number."""

    _store: TCPStore | None = None

    def open_store(self, host: str | None, num_ranks: int, timeout_s: float) -> str:
        """Of rank 0: where the group is to meet."""
        self._store, address = open_store(node_host(host), num_ranks, timeout_s)
        return address

    def train(self, rank: int, connection: Connection, coordinator: Any, group: Group) -> None:
        """Work until no rank has a batch left; rank 0 publishes the state."""
        config, policy = self._config, self._config.consistency
        assert isinstance(policy, AllReduce)
        flat = build_flat(config, self._num_classes, "cuda" if config.scaling.use_gpu else "cpu")
        objective = build_objective(config, self._num_classes)
        computer = GradientComputer(flat, objective, config.training.clip_norm, config.compute)
        ema = config.ema if rank == 0 else None
        replica = Replica(flat, config.optimizer, config.schedule, group.horizon, ema)
        reports = Reports(rank, group.incarnations[rank], coordinator)
        batches = train_loader(config, open_train(config)).batches(reports.leases())
        with (
            closing(connection.open(config)) as client,
            joined(group.rendezvous, rank, node_host(group.host), self._store) as process_group,
        ):
            if rank == 0:
                replica.load(read_published(client, "group"))
            loop = AllReduceLoop(
                computer,
                replica,
                process_group,
                policy,
                image_size=config.data.image_size,
                num_receipts=config.scaling.num_servers,
                slowdown=config.scaling.slow_workers.get(rank, 1.0),
            )
            if rank == 0:
                publisher = Publisher(
                    client,
                    group.marks,
                    policy.publish_every_s,
                    lambda samples: _tell(coordinator, samples),
                    replica.clocks.samples,
                )
                _run_and_publish(loop, replica, publisher, reports, batches, group.incarnations)
            else:
                loop.run(batches, reports.add, reports.beat)
        reports.finish()


def _tell(coordinator: Any, samples: int) -> None:
    ray.get(coordinator.published.remote(samples), timeout=LEASE_TIMEOUT_S)


def _run_and_publish(
    loop: AllReduceLoop,
    replica: Replica,
    publisher: Publisher,
    reports: Reports,
    batches: Any,
    incarnations: Sequence[int],
) -> None:
    def state() -> ModelState:
        lives = enumerate(zip(incarnations, loop.num_batches, strict=True))
        return replica.state({rank: {life: count - 1} for rank, (life, count) in lives})

    def after_step() -> None:
        reports.beat()
        if publisher.is_due(replica.clocks.samples):
            publisher.begin(state())

    loop.run(batches, reports.add, after_step)
    publisher.finish(state())


RankActor = ray.remote(RankProcess)


class GroupSupervisor(Supervisor):
    """Workers that need one another: if one is lost, all are, and the session with them."""

    def start_due(self, num_consumed: int) -> None:
        """Start a rank in every place, all at once, and let them meet."""
        if self.staff.num_opened == 0 and ray.get(self._coordinator.has_work.remote()):
            self.staff.num_opened = self._plan.config.scaling.max_workers
            self._start_group()

    def _start_group(self) -> None:
        config = self._plan.config
        policy, num_ranks = config.consistency, config.scaling.max_workers
        assert isinstance(policy, AllReduce)
        incarnations = [self._enlist(rank) for rank in range(num_ranks)]
        actors = [self._create(rank, RankActor) for rank in range(num_ranks)]
        opened = actors[0].open_store.remote(self._room.host, num_ranks, policy.timeout_s)
        address = ray.get(opened, timeout=RENDEZVOUS_TIMEOUT_S)
        use_gpu = config.scaling.use_gpu
        rendezvous = Rendezvous(address, num_ranks, policy.timeout_s, use_gpu)
        marks = self._plan.publish_marks
        group = Group(rendezvous, self._room.host, incarnations, self._plan.horizon, marks)
        for rank, actor in enumerate(actors):
            ended = actor.train.remote(rank, self.connection, self._coordinator, group)
            self._running[ended] = rank

    def settle(self, ended: Any) -> None:
        """Deal with the end of a rank. Raises InputError for what the user can mend, GroupLost."""
        rank = self._running.pop(ended)
        try:
            ray.get(ended)
        except RayError as error:
            others = errors_among(self.running)
            self._lose({rank: error, **{self._running[each]: why for each, why in others.items()}})
        self._end(rank)
        self._dismiss(rank)

    def _heed_notices(self) -> None:
        """A rank can't leave the others: when its node is gone, the run begins again without it."""

    def conclude(self) -> None:
        """All ranks have ended, and rank 0 has published the last state."""

    def _lose(self, errors: dict[int, RayError]) -> None:
        self.num_deaths += sum(isinstance(error, RayActorError) for error in errors.values())
        rank, error = min(errors.items(), key=lambda item: precedence(item[1]))
        cause = cause_of(error)
        if isinstance(error, InputError):
            raise InputError(str(cause)) from None
        verb = "died" if isinstance(error, RayActorError) else "failed"
        raise GroupLost(f"worker {rank} {verb}: {one_line(cause)}") from error
