"""Workers of several processes each: the actors, and what keeps them going."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from asynception.actors import Connection, Start, WorkerProcess
from asynception.building import open_train, train_loader
from asynception.cluster import LOOPBACK
from asynception.failures import one_line
from asynception.lost_ranks import errors_among, precedence
from asynception.process_group import Rendezvous, joined_on_node, open_store
from asynception.supervisor import Supervisor, cause_of
from worker.data.lease import Lease
from worker.data.loader import Batch
from worker.gradient import GradientComputer
from worker.loop import WorkerLoop
from worker.node import NodeLeader, NodeRanks, follow


class NodeWorkerProcess(WorkerProcess):
    """One process, in one life, of a worker that has several.

    They meet on the loopback interface of their node, so that nothing of it leaves the host.
    """

    _store: TCPStore | None = None
    _follows = False
    _ranks: NodeRanks | None = None
    _leader: NodeLeader | None = None

    def open_store(self) -> str:
        """Of rank 0: where the processes are to meet, as HOST:PORT."""
        failure, num_ranks = self._config.failure, self._config.scaling.processes_per_worker
        self._store, address = open_store(LOOPBACK, num_ranks, failure.worker_timeout_s)
        return address

    def lead(
        self,
        address: str,
        worker: int,
        incarnation: int,
        connection: Connection,
        coordinator: Any,
        start: Start,
    ) -> str | None:
        """Rank 0: work until there is nothing left to lease; see `WorkerProcess.run`."""
        with self._joined(address, rank=0) as self._ranks:
            why_left = self.run(worker, incarnation, connection, coordinator, start)
            assert self._leader is not None
            self._leader.end()
        return why_left

    def _leave_loop(self, loop: WorkerLoop) -> None:
        """All ranks end with the leases that all know of: batches of them are under way."""

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        before = self._sigterm_before
        if self._follows and callable(before):
            before(number, frame)  # a rank that isn't the first can't leave: it dies, as before
        else:
            super()._terminate(number, frame)

    def follow(self, address: str, worker: int, rank: int) -> None:
        """Another rank: work as long as rank 0 does."""
        self._follows = True
        computer = self._computer(worker)
        # Rank 0 goes on with the seed's numbers; the masks of dropout are to be others here.
        torch.manual_seed(self._config.training.seed + rank)
        batches_per_push = self._config.batches_per_process
        assert batches_per_push is not None
        with self._joined(address, rank) as self._ranks:
            follow(computer, self._ranks, self._batches(iter(())), batches_per_push)

    def _joined(self, address: str, rank: int) -> AbstractContextManager[NodeRanks]:
        scaling = self._config.scaling
        timeout_s = self._config.failure.worker_timeout_s  # nobody waits longer for a worker
        num_ranks = scaling.processes_per_worker
        rendezvous = Rendezvous(address, num_ranks, timeout_s, scaling.use_gpu)
        return joined_on_node(rendezvous, rank, LOOPBACK, self._store)

    def _batches(self, leases: Iterator[Lease]) -> Iterator[Batch]:
        assert self._ranks is not None
        return self._ranks.batches(train_loader(self._config, open_train(self._config)), leases)

    def _node(self, computer: GradientComputer) -> NodeLeader:
        assert self._ranks is not None
        self._leader = NodeLeader(computer, self._ranks)
        return self._leader


NodeWorkerActor = ray.remote(NodeWorkerProcess)


class NodeSupervisor(Supervisor):
    """Workers of several processes. If one process is lost, so are the others of that worker, and
    a new life of the worker takes their place as it does for a worker of one process."""

    def __init__(self, *arguments: Any) -> None:
        """As of `Supervisor`."""
        super().__init__(*arguments)
        self._ranks: dict[Any, int] = {}
        """Of each Ray reference in `_running`, the process that it stands for."""
        self._others: dict[int, list[Any]] = {}
        """By worker, its actors but for the one in `_actors`, with which they live and die."""
        scaling = self._plan.config.scaling
        summed = "NCCL" if scaling.use_gpu else "gloo"
        self._reporter.event(
            f"each worker is {scaling.processes_per_worker} processes on one node, whose gradients "
            f"are summed by {summed} and pushed once"
        )

    def _start(self, worker: int) -> None:
        incarnation = self._enlist(worker)
        num_ranks = self._plan.config.scaling.processes_per_worker
        others = [self._create(worker, NodeWorkerActor) for _ in range(num_ranks - 1)]
        leader = self._create(worker, NodeWorkerActor, max_concurrency=2)  # it answers as it runs
        self._places.begin(worker, leader.ready.remote())
        address = leader.open_store.remote()  # not waited for here: other workers go on
        connection, coordinator = self.connection, self._coordinator
        ended = leader.lead.remote(
            address, worker, incarnation, connection, coordinator, self._start_clocks()
        )
        following = [
            actor.follow.remote(address, worker, rank) for rank, actor in enumerate(others, 1)
        ]
        for rank, reference in enumerate((ended, *following)):
            self._running[reference], self._ranks[reference] = worker, rank

    def _create(self, worker: int, kind: Any, **more: Any) -> Any:
        """One more actor in a worker's place."""
        if worker in self._actors:
            self._others.setdefault(worker, []).append(self._actors[worker])
        return super()._create(worker, kind, **more)

    def settle(self, ended: Any) -> None:
        """Deal with the end of one process of a worker: as with the whole worker's, unless it is
        one that has done what its rank 0 had for it."""
        worker = self._running[ended]
        ranks = {each: self._ranks[each] for each, w in self._running.items() if w == worker}
        errors = errors_among([ended])
        if not errors and ranks[ended] > 0:
            self._forget(ended)
            return
        if errors:
            errors = errors_among(list(ranks))
        telling = self._telling(ranks, errors)
        if telling in errors and ranks[telling] > 0:
            self._reporter.event(
                f"worker {worker} lost its process {ranks[telling]}: "
                f"{one_line(cause_of(errors[telling]))}"
            )
        for each in ranks:
            if each is not telling:
                self._forget(each)
        del self._ranks[telling]
        super().settle(telling)

    def _telling(self, ranks: Mapping[Any, int], errors: Mapping[Any, RayError]) -> Any:
        """The reference of a worker's processes that says how its life ended."""
        first = next((each for each, rank in ranks.items() if rank == 0))
        if first not in errors and ray.wait([first], timeout=0)[0]:
            return first  # its work was done, whatever became of the others since
        return min(errors, key=lambda each: precedence(errors[each]))

    def _forget(self, reference: Any) -> None:
        del self._running[reference], self._ranks[reference]

    def _dismiss(self, worker: int) -> None:
        for actor in self._others.pop(worker, ()):
            ray.kill(actor)
        super()._dismiss(worker)
