"""Ray itself: joining or starting it, and room for a run's actors."""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from asynception.config import RayConfig
from asynception.config_scaling import ScalingConfig
from asynception.controls import Controls
from asynception.failures import Stopped
from asynception.notices import draining_nodes, free_resources
from asynception.plan import RunPlan
from asynception.shortage import EVALUATOR, MEMORY, Part, Resources, There, fits, named, shortage
from asynception.spots import NoRoom, Spot, emptiest
from asynception.worker_room import OwnRoom, SharedRoom, WorkerRoom
from model.errors import InputError

OBJECT_STORE_NUM_BYTES = 100 << 20
"""Of a local Ray: tensors pass through it only when a server is lost."""

JOIN_TIMEOUT_S = 10.0
"""A cluster whose head doesn't answer for so long can't be joined."""

COORDINATOR_RESTARTS = 10
"""Deaths of a session's coordinator that it outlives."""

PLACE_POLL_S, ROOM_POLL_S = 5.0, 0.2

QUIET_WAIT_S = 5.0
"""For room, before a line says what is waited for."""

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


@contextmanager
def reserved(plan: RunPlan, host: str | None, controls: Controls) -> Iterator[Room]:
    """Room for a run's actors on the cluster, the least number of workers among them.

    Raises InputError if it hasn't got it in time, Stopped if it was told to stop meanwhile.

    While it waits, Ray's autoscaler sees what is asked for.
    """
    scaling = plan.config.scaling
    parts = _parts(plan)
    bundles = [part.resources for part in parts]
    if plan.config.ray.address is None:
        standbys = parts[: scaling.num_servers * scaling.replicas]
        lack = shortage([*parts, *standbys], _there(ray.cluster_resources()))
        if lack:
            raise InputError(lack)
    groups: list[PlacementGroup] = []
    own = OwnRoom(bundles[-1], scaling.min_workers) if scaling.is_range else None
    try:
        held = bundles[: scaling.num_servers + 1] if own else bundles
        for count, strategy in _strategies(scaling, len(held)):
            first = sum(group.bundle_count for group in groups)
            wanted = [dict(bundle) for bundle in held[first : first + count]]
            groups.append(placement_group(wanted, strategy=strategy))
        if own is not None:
            own.want(range(scaling.max_workers))
        _wait_for_room(groups, parts, plan, controls, own)
        share = {MEMORY: float(plan.model.process_num_bytes()), **scaling.process_resources}
        process_resources = {name: value for name, value in share.items() if value}
        workers = own or SharedRoom(groups[-1], scaling.max_workers, bundles[-1])
        yield Room(groups, held, scaling.num_servers, host, process_resources, workers)
    finally:
        if own is not None:
            own.close()
        for group in groups:
            remove_placement_group(group)


def _strategies(scaling: ScalingConfig, num_bundles: int) -> list[tuple[int, str]]:
    """How many bundles each placement group has, in order, and its strategy."""
    strategy, num_servers = scaling.placement_strategy, scaling.num_servers
    if scaling.spread_servers and num_servers > 1 and not strategy.startswith("STRICT_"):
        return [(num_servers, "SPREAD"), (num_bundles - num_servers, strategy)]
    return [(num_bundles, strategy)]


def _wait_for_room(
    groups: Sequence[PlacementGroup],
    parts: Sequence[Part],
    plan: RunPlan,
    controls: Controls,
    own: OwnRoom | None = None,
) -> None:
    """Says in one line what is missing, once that takes a while, and again when it gives up."""
    limit_s = plan.config.run.placement_timeout_s
    limit = f"run.placement_timeout_s = {limit_s:g}"
    quiet_s = min(QUIET_WAIT_S, limit_s)
    if _placed(groups, own, quiet_s, controls.stopping):
        return
    if limit_s > quiet_s:
        controls.waiting(f"waiting for room ({limit}): {_why_waiting(groups, parts, plan, own)}")
        if _placed(groups, own, limit_s - quiet_s, controls.stopping):
            return
    raise InputError(f"no room within {limit}: {_why_waiting(groups, parts, plan, own)}")


def _placed(
    groups: Sequence[PlacementGroup],
    own: OwnRoom | None,
    timeout_s: float,
    stopping: threading.Event,
) -> bool:
    deadline_s = time.monotonic() + timeout_s
    for group in groups:
        while not group.wait(_whole_seconds(deadline_s - time.monotonic())):
            if stopping.is_set():
                raise Stopped("stopped while it waited for room")
            if time.monotonic() >= deadline_s:
                return False
    while own is not None and own.num_lacking > 0:
        if stopping.wait(ROOM_POLL_S):
            raise Stopped("stopped while it waited for room")
        if time.monotonic() >= deadline_s:
            return False
    return True


def _whole_seconds(left_s: float) -> int:
    """At least one, as Ray cuts off what is less."""
    return math.ceil(max(1.0, min(PLACE_POLL_S, left_s)))


def _why_waiting(
    groups: Sequence[PlacementGroup], parts: Sequence[Part], plan: RunPlan, own: OwnRoom | None
) -> str:
    scaling = plan.config.scaling
    return shortage(_pending(groups, parts, own), _there(ray.available_resources())) or (
        "the cluster has the resources, but no node has room for every part with "
        f"scaling.placement_strategy = {scaling.placement_strategy}"
        f"{' and scaling.spread_servers = true: set that to false,' if len(groups) > 1 else ':'} "
        f"use PACK, or smaller scaling.resources_per_worker{_or_fewer_processes(scaling)}"
    )


def _pending(
    groups: Sequence[PlacementGroup], parts: Sequence[Part], own: OwnRoom | None
) -> list[Part]:
    """Those that have no place yet: what the others hold isn't free any more."""
    pending, rest = list[Part](), list(parts)
    for group in groups:
        in_group, rest = rest[: group.bundle_count], rest[group.bundle_count :]
        if placement_group_table(group)["state"] != "CREATED":
            pending += in_group
    return [*pending, *(rest[: own.num_lacking] if own is not None else ())]


def _or_fewer_processes(scaling: ScalingConfig) -> str:
    if scaling.processes_per_worker == 1:
        return ""
    return f" or scaling.processes_per_worker (now {scaling.processes_per_worker}, on one node)"


def _there(free: Resources) -> There:
    return There([node["Resources"] for node in ray.nodes() if node["Alive"]], free)


def _parts(plan: RunPlan) -> list[Part]:
    """Servers, the evaluator, the least number of workers."""
    scaling, model = plan.config.scaling, plan.model
    servers = [
        {MEMORY: float(model.server_num_bytes(shard)), **scaling.resources_per_server}
        for shard in range(scaling.num_servers)
    ]
    evaluator = {MEMORY: float(model.process_num_bytes()), "CPU": plan.config.evaluation.cpus}
    worker = {MEMORY: float(model.worker_num_bytes()), **scaling.worker_resources}
    return [
        *(Part("server", _above_0(each)) for each in servers),
        Part(EVALUATOR, _above_0(evaluator)),
        *[Part("worker", _above_0(worker), scaling.processes_per_worker)] * scaling.min_workers,
    ]


def _above_0(resources: Resources) -> Resources:
    return {name: value for name, value in resources.items() if value}
