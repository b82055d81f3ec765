"""Ray itself: joining or starting it, and where a run's actors are placed."""

import logging
import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from asynception.config import RayConfig
from asynception.notices import draining_nodes, free_resources
from asynception.shortage import Resources, fits, named
from asynception.spots import NoRoom, Spot, emptiest
from asynception.worker_room import WorkerRoom
from model.errors import InputError

OBJECT_STORE_NUM_BYTES = 100 << 20
"""Of a local Ray: tensors pass through it only when a server is lost."""

JOIN_TIMEOUT_S = 10.0
"""A cluster whose head doesn't answer for so long can't be joined."""

COORDINATOR_RESTARTS = 10
"""Deaths of a session's coordinator that it outlives."""

PLACE_POLL_S = 5.0

LOOPBACK = "127.0.0.1"


@contextmanager
def connected(config: RayConfig, metrics_port: int | None = None) -> Iterator[str | None]:
    """Ray, for the length of the block: the caller's if it is initialised, else the cluster at
    `ray.address`, else a local one that is shut down again.

    Yields the address that servers are to bind to: loopback on a local Ray, so that nothing
    outside can reach them; None for each node's own. metrics_port: at which a local Ray exports
    its metrics, to all of the machine's addresses; any free one if None. Raises InputError.
    """
    if ray.is_initialized():
        yield None
        return
    with _own_sigterm():
        if config.address:
            _join(config.address)
        else:
            _start_local(metrics_port)
    try:
        yield None if config.address else LOOPBACK
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray's start sets handlers of its own, which abort at SIGTERM; the program's come back."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None: not set by Python, which then can't set it again either.
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _join(address: str) -> None:
    if ":" in address and "://" not in address and os.environ.get("RAY_USE_TLS") != "1":
        _check_head_answers(address)
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"ray.address = {address}: can't join that cluster: {reason}") from None


def _check_head_answers(address: str) -> None:
    """Ray itself would try again for minutes. Raises InputError."""
    options = [("grpc.enable_http_proxy", 0)]  # as Ray's own channels
    with grpc.insecure_channel(address, options) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
        try:
            check(b"", timeout=JOIN_TIMEOUT_S, wait_for_ready=True)
        except grpc.RpcError as error:
            raise InputError(
                f"ray.address = {address}: no Ray head answers there "
                f"({error.code().name.lower()}): give the HOST:PORT that ray start printed, or auto"
            ) from None


def _start_local(metrics_port: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_NUM_BYTES,
        _metrics_export_port=metrics_port,
    )


@dataclass(frozen=True)
class Room:
    """Bundles for each server, then the evaluator, then each worker, in one placement group, or
    two if servers are spread by themselves. Workers that come and go have groups of their own."""

    groups: Sequence[PlacementGroup]
    bundles: Sequence[Resources]
    num_servers: int
    host: str | None
    """Address that servers bind to; None for the address of the node that each is on."""
    process_resources: Resources
    """Of each process of a worker."""
    workers: WorkerRoom

    def for_server(self, shard: int) -> dict[str, Any]:
        """Options of the actor that serves a shard."""
        return self._options(shard)

    def for_standby(self, shard: int, away_from: str, crowded: Mapping[str, int]) -> Spot:
        """A node for a standby of a shard's server, which is on the node `away_from`.

        crowded: how many servers and standbys each node has. A standby gets the shard's place in
        the group, if no server is in it any more. Else it has none, as its node must be another one
        whenever the server's has changed: the emptiest node that has room now is taken, or else
        that is large enough, and, if there is none, that of the server. Raises NoRoom if the
        server's own node will soon be gone, and no other has room now.
        """
        needs, leaving = self.bundles[shard], self.draining_nodes()
        alive = {each["NodeID"] for each in ray.nodes() if each["Alive"]}
        own = self._nodes().get(shard, "")
        if own in alive.difference(leaving, (away_from,)):
            return Spot(self._options(shard), True, own)
        nodes = self._large_enough(needs, away_from, leaving)
        node = emptiest(nodes, away_from, crowded, leaving)
        if node is None:
            raise NoRoom(f"no other node that stays has {named(needs) or 'room'} free")
        options = self._needing(needs)
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        return Spot(options, node != away_from, node)

    @staticmethod
    def _large_enough(
        needs: Resources, away_from: str, leaving: Collection[str]
    ) -> Collection[str]:
        """Nodes with room now; if none of the others that stay has any, all that could have it."""
        free = {node for node, offered in free_resources().items() if fits(needs, offered)}
        # Who has to leave can use a standby at once, or not at all.
        if away_from in leaving or free.difference(leaving, (away_from,)):
            return free
        there = (each for each in ray.nodes() if each["Alive"])
        return [each["NodeID"] for each in there if fits(needs, each["Resources"])]

    def for_coordinator(self) -> dict[str, Any]:
        """Options of the coordinator's actor: it stays on this node, where its journal is.

        Ray starts it again when it dies, and makes calls again whose answers were lost.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return {
            "max_restarts": COORDINATOR_RESTARTS,
            "max_task_retries": -1,
            "scheduling_strategy": here,
        }

    def for_evaluator(self) -> dict[str, Any]:
        """Options of the evaluator's actor; without its place it runs beside others, anywhere."""
        return self._options(self.num_servers) if self.evaluator_has_node() else {"num_cpus": 0}

    def evaluated(self, reference: Any) -> Any:
        """What an evaluation returns. Raises NoRoom if its actor waits for a place, and its errors.

        An actor whose node dies before it has begun there is neither dead nor alive.
        """
        while not ray.wait([reference], timeout=PLACE_POLL_S)[0]:
            if not self.evaluator_has_node():
                raise NoRoom("the evaluator's node is gone")
        return ray.get(reference)

    def for_worker(self, worker: int) -> dict[str, Any]:
        """Options of each of a worker's actors: a share of one bundle, which lies on one node."""
        group, bundle = self.workers.bundle(worker)
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        return {**self._needing(self.process_resources), "scheduling_strategy": place}

    @property
    def worker_resources(self) -> Resources:
        """What each worker needs."""
        return self.workers.resources

    def worker_nodes(self) -> dict[int, str]:
        """Ray's id of the node that has each worker's place; empty while there is none."""
        return self.workers.nodes()

    def draining_nodes(self) -> Collection[str]:
        """Nodes that will soon be gone."""
        return draining_nodes()

    def evaluator_has_node(self) -> bool:
        """Whether the evaluator's place is on any node."""
        return bool(self._nodes().get(self.num_servers))

    def _nodes(self) -> Mapping[int, str]:
        """By bundle; as far as Ray has noticed who is dead."""
        nodes: dict[int, str] = {}
        for group in self.groups:
            first = len(nodes)
            placed = placement_group_table(group)["bundles_to_node_id"]
            nodes |= {first + bundle: node for bundle, node in placed.items()}
        return nodes

    def _place(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        for group in self.groups:
            if bundle < group.bundle_count:
                break
            bundle -= group.bundle_count
        return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)

    def _options(self, bundle: int) -> dict[str, Any]:
        return {**self._needing(self.bundles[bundle]), "scheduling_strategy": self._place(bundle)}

    @staticmethod
    def _needing(needs: Resources) -> dict[str, Any]:
        resources = dict(needs)
        return {
            "num_cpus": resources.pop("CPU", 0),
            "num_gpus": resources.pop("GPU", 0),
            "memory": resources.pop("memory", 0),
            "resources": resources,
        }
