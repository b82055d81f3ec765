"""Room for a run's actors: asking Ray for it, waiting for it, changing it for another."""

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Self

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from asynception.cluster import PLACE_POLL_S, Room
from asynception.config_scaling import ScalingConfig
from asynception.controls import Controls
from asynception.failures import Stopped
from asynception.plan import RunPlan
from asynception.shortage import EVALUATOR, MEMORY, Part, Resources, There, shortage
from asynception.worker_room import OwnRoom, SharedRoom
from model.errors import InputError

ROOM_POLL_S = 0.2

QUIET_WAIT_S = 5.0
"""For room, before a line says what is waited for."""


class Reservation:
    """Room for a run's actors, held as long as the block; it may be changed for another's."""

    def __init__(self, plan: RunPlan, host: str | None, controls: Controls) -> None:
        self._plan, self._host, self._controls = plan, host, controls
        self._holding = ExitStack()

    def __enter__(self) -> Self:
        """Raises as `reserved`."""
        self._reserve()
        return self

    def _reserve(self) -> None:
        self.room = self._holding.enter_context(reserved(self._plan, self._host, self._controls))

    def __exit__(self, *_: object) -> None:
        self._holding.close()

    def lacks(self, plan: RunPlan) -> str | None:
        """What is missing for the servers of another plan in the place of these, in words.

        None as well where Ray alone knows.
        """
        free = Counter(ray.available_resources())
        for part in _server_parts(self._plan):
            free.update(part.resources)
        return shortage(_server_parts(plan), _there(free))

    def change(self, plan: RunPlan) -> None:
        """Give the room back, and reserve that of another plan, for as many workers as are wanted.

        Nobody may be in it. Raises InputError, with the former room held again unless others took
        that meanwhile; Stopped.
        """
        before, wanted = self._plan, len(self.room.workers.wanted)
        try:
            self._exchange(plan, wanted)
        except InputError:
            self._exchange(before, wanted)
            raise

    def _exchange(self, plan: RunPlan, num_workers: int) -> None:
        self._holding.close()
        self._plan = plan
        self._reserve()
        workers, spare = self.room.workers, set(self.room.workers.wanted)
        workers.want(range(num_workers))
        for worker in spare.difference(workers.wanted):
            workers.release(worker)


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
        others = parts[scaling.num_servers :]
        lack = shortage([*_server_parts(plan), *others], _there(ray.cluster_resources()))
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
    evaluator = {MEMORY: float(model.process_num_bytes()), "CPU": plan.config.evaluation.cpus}
    worker = {MEMORY: float(model.worker_num_bytes()), **scaling.worker_resources}
    return [
        *_servers(plan),
        Part(EVALUATOR, _above_0(evaluator)),
        *[Part("worker", _above_0(worker), scaling.processes_per_worker)] * scaling.min_workers,
    ]


def _servers(plan: RunPlan) -> list[Part]:
    scaling, model = plan.config.scaling, plan.model
    needs = [
        {MEMORY: float(model.server_num_bytes(shard)), **scaling.resources_per_server}
        for shard in range(scaling.num_servers)
    ]
    return [Part("server", _above_0(each)) for each in needs]


def _server_parts(plan: RunPlan) -> list[Part]:
    """Standbys included, which have no place of their own."""
    return _servers(plan) * (1 + plan.config.scaling.replicas)


def _above_0(resources: Resources) -> Resources:
    return {name: value for name, value in resources.items() if value}
