"""The nodes of a Ray cluster: the checks of each, their clocks, and the links between them."""

import logging
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from asynception.cluster import connected
from asynception.config import RayConfig
from asynception.doctor import clocks, links, node
from asynception.doctor.finding import Finding, Verdict
from asynception.doctor.links import Peer, judge_link, judge_nodes, plan_rounds
from asynception.doctor.needs import Needs
from asynception.doctor.node import Place
from asynception.doctor.room import judge_room
from asynception.doctor.timed import HERE, Check, carry_out
from asynception.doctor.tokens import measure_token
from asynception.doctor.versions import installed_versions, judge_alike
from asynception.failures import one_line

CLUSTER = "cluster"
"""Where a finding is about all nodes."""

JOIN_LIMIT_S = 60.0
START_LIMIT_S = 90.0
"""For a process on a node to start and import torch."""

LINK_LIMIT_S = 2 * (links.MEASURED_S + 2 * links.ALLOWANCE_S) + 10.0

_MEND_NODE = (
    "install the same asynception on that node, and see its log (ray logs) and `ray status`"
)

_MEND_LINK = "let firewalls pass lanes.port_range between nodes, or all ports if it is unset"

PeerActor = ray.remote(num_cpus=0)(Peer)


@dataclass(frozen=True)
class RayNode:
    """A living node."""

    id: str
    place: Place


@dataclass(frozen=True)
class _Peer:
    """A node's process for measuring clock and links."""

    node: RayNode
    actor: Any
    second: Any = None
    """Another one beside it, where there are no other nodes."""

    @property
    def actors(self) -> list[Any]:
        """One or both."""
        return [actor for actor in (self.actor, self.second) if actor is not None]


@dataclass(frozen=True)
class NodeReport:
    """What a node's task brings back."""

    findings: Sequence[Finding]
    versions: dict[str, str]


@ray.remote(num_cpus=0, max_calls=1, max_retries=0)  # its process ends, and hung checks with it
def _examine(needs: Needs | None, place: Place) -> NodeReport:
    return NodeReport(list(node.examine(needs, place)), installed_versions())


def examine_cluster(address: str, needs: Needs | None) -> Iterator[Finding]:
    """All findings about a cluster, which is joined and left again."""
    with ExitStack() as stack:
        join = Check("cluster", partial(_join, address, needs, stack), JOIN_LIMIT_S)
        joined = carry_out(join, CLUSTER)
        yield joined
        if not ray.is_initialized():
            return
        gcs_address = ray.get_runtime_context().gcs_address
        yield carry_out(Check("token", partial(measure_token, gcs_address)), CLUSTER)
        nodes = living_nodes()
        port_range = needs.config.lanes.port_range if needs else None
        with _peers(nodes, port_range) as peers:
            silent = yield from _silent(peers)
            answering = [each for each in peers if each not in silent]
            yield from _clocks(answering)
            yield from _nodes([each.node for each in answering], needs)
            yield from _links(
                answering, needs.pull_num_bytes + needs.push_num_bytes if needs else 0
            )


def _join(address: str, needs: Needs | None, stack: ExitStack) -> Verdict:
    # That this is not the main thread, and sets no handlers, is as it should be.
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
    stack.enter_context(connected(RayConfig(address=address)))
    wanted = needs.resources if needs else {}
    total, free = ray.cluster_resources(), ray.available_resources()
    return judge_room(len(living_nodes()), total, free, wanted)


def living_nodes() -> list[RayNode]:
    """By their addresses; nodes that share one are told apart by the start of their ids."""
    alive = sorted(
        (each for each in ray.nodes() if each["Alive"]), key=lambda each: each["NodeManagerAddress"]
    )
    hosts = [each["NodeManagerAddress"] for each in alive]
    return [
        RayNode(
            each["NodeID"],
            Place(
                host,
                host if hosts.count(host) == 1 else f"{host} ({each['NodeID'][:6]})",
                len(alive),
                in_cluster=True,
                ray_gpus=each["Resources"].get("GPU", 0.0),
            ),
        )
        for host, each in zip(hosts, alive, strict=True)
    ]


def _on(each: RayNode) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(each.id, soft=False)


@contextmanager
def _peers(nodes: Sequence[RayNode], port_range: tuple[int, int] | None) -> Iterator[list[_Peer]]:
    """A process on each node, with a second one if there is one node alone."""
    actors = [_start(each, port_range) for each in nodes]
    second = _start(nodes[0], port_range) if len(nodes) == 1 else None
    try:
        yield [_Peer(each, actor, second) for each, actor in zip(nodes, actors, strict=True)]
    finally:
        for actor in (*actors, second):
            if actor is not None:
                ray.kill(actor)


def _start(each: RayNode, port_range: tuple[int, int] | None) -> Any:
    return PeerActor.options(scheduling_strategy=_on(each)).remote(each.place.host, port_range)


def _silent(peers: Sequence[_Peer]) -> Generator[Finding, None, list[_Peer]]:
    """Those whose node starts no process, or no second one, with a finding for each."""
    calls = [[actor.now.remote() for actor in peer.actors] for peer in peers]
    everyone = [call for each in calls for call in each]
    ray.wait(everyone, num_returns=len(everyone), timeout=START_LIMIT_S)
    silent = []
    for each, peer in zip(calls, peers, strict=True):
        try:
            ray.get(each, timeout=0.1)
        except GetTimeoutError:
            found = f"started no process in {START_LIMIT_S:.0f} s"
        except RayError as error:
            found = one_line(error)
        else:
            continue
        silent.append(peer)
        yield Finding("node", peer.node.place.name, "fail", found, _MEND_NODE)
    return silent


def _clocks(peers: Sequence[_Peer]) -> Iterator[Finding]:
    for peer in peers:
        measure = partial(clocks.measure_clock, partial(_ask_clock, peer.actor))
        yield carry_out(Check("clock", measure, if_late=_MEND_NODE), peer.node.place.name)


def _ask_clock(actor: Any) -> float:
    return float(ray.get(actor.now.remote(), timeout=10.0))


def _nodes(nodes: Sequence[RayNode], needs: Needs | None) -> Iterator[Finding]:
    tasks = {_examine.options(scheduling_strategy=_on(n)).remote(needs, n.place): n for n in nodes}
    limit_s = START_LIMIT_S + max((node.time_limit_s(needs, n.place) for n in nodes), default=0.0)
    ray.wait(list(tasks), num_returns=len(tasks), timeout=limit_s)
    versions = {HERE: installed_versions()}
    for task, each in tasks.items():
        try:
            report: NodeReport = ray.get(task, timeout=1.0)
        except GetTimeoutError:
            ray.cancel(task, force=True)
            found = f"no report in {limit_s:.0f} s"
            yield Finding("node", each.place.name, "fail", found, _MEND_NODE)
        except RayError as error:
            yield Finding("node", each.place.name, "fail", one_line(error), _MEND_NODE)
        else:
            yield from report.findings
            versions[each.place.name] = report.versions
    yield carry_out(Check("one software", partial(judge_alike, versions)), CLUSTER)


def _links(peers: Sequence[_Peer], step_num_bytes: int) -> Iterator[Finding]:
    if len(peers) == 1 and peers[0].second is None:
        return  # the others are silent
    speeds: dict[tuple[int, int], float] = {}
    for pairs in plan_rounds(len(peers)) if peers else ():
        with ThreadPoolExecutor(len(pairs)) as threads:
            yield from threads.map(partial(_link, peers, step_num_bytes, speeds), pairs)
    for number, verdict in judge_nodes(speeds).items():
        yield Finding("link", peers[number].node.place.name, **vars(verdict))


def _link(
    peers: Sequence[_Peer],
    step_num_bytes: int,
    speeds: dict[tuple[int, int], float],
    pair: tuple[int, int],
) -> Finding:
    one, other = (peers[number] for number in pair)
    speeds[pair] = 0.0

    def measure() -> Verdict:
        there, back, round_trip_s = _measure_link(one, other)
        speeds[pair] = min(there, back)
        loopback = one.node.place.host == other.node.place.host
        return judge_link(there, back, round_trip_s, step_num_bytes, loopback)

    names = dict.fromkeys(peer.node.place.name for peer in (one, other))
    return carry_out(Check("link", measure, LINK_LIMIT_S, _MEND_LINK), " - ".join(names))


def _measure_link(one: _Peer, other: _Peer) -> tuple[float, float, float]:
    """Bytes a second there and back, and seconds of a round trip. Raises OSError."""
    actors = (one.actor, one.second if one is other else other.actor)
    there, round_trip_s = _one_way(*actors)
    back, _ = _one_way(*reversed(actors))
    return there, back, round_trip_s


def _one_way(sender: Any, receiver: Any) -> tuple[float, float]:
    """Raises OSError."""
    listening = ray.get(receiver.open.remote(), timeout=10.0)
    limit_s = links.MEASURED_S + 2 * links.ALLOWANCE_S
    bytes_per_s, round_trip_s = ray.get(sender.measure.remote(*listening), timeout=limit_s)
    return bytes_per_s, round_trip_s
