"""A session's servers: their actors, and which of them has which shard now."""

import threading
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import ray

from asynception.actors import Connection, Replication, ServerActor
from asynception.cluster import Room
from asynception.plan import RunPlan
from ps.tls import Identities

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Server:
    """One actor that serves a shard, or is a standby of the one that does."""

    actor: Any
    address: str
    node: str
    """Ray's id of the node that it is on."""
    serving: Any = None
    """A Ray reference that is ready when the actor has ended."""


class ServerGone(Exception):
    """The server that a standby was to be for has ended."""


class Servers:
    """One server a shard, and the actors that came and went. Any thread may call."""

    def __init__(self, plan: RunPlan, room: Room, token: str, tls: Identities | None) -> None:
        self._plan, self._room, self._token, self._tls = plan, room, token, tls
        self._actors: list[Any] = []
        self._is_killed = False
        self._choosing = threading.Lock()
        self._standby_nodes: dict[int, str] = {}
        self.primaries: list[Server] = []
        """By shard."""

    @property
    def serving(self) -> list[Any]:
        """By shard, a Ray reference that is ready when its server has ended."""
        return [server.serving for server in self.primaries]

    def start(self) -> Connection:
        """Start a server for each shard. Raises GetTimeoutError, RayActorError."""
        shards = range(self._plan.config.scaling.num_servers)
        actors = [self._create(shard, self._room.for_server(shard)) for shard in shards]
        begun = ray.get([each.begin.remote() for each in actors], timeout=START_TIMEOUT_S)
        self.primaries = [Server(actor, *place) for actor, place in zip(actors, begun, strict=True)]
        caller = self._tls.caller if self._tls else None
        addresses = [server.address for server in self.primaries]
        return Connection(addresses, self._plan.model.layout, self._token, caller)

    def attend(self) -> None:
        """Learn of their ends from now on."""
        self.primaries = [
            replace(server, serving=server.actor.serve.remote()) for server in self.primaries
        ]

    def leaving(self) -> Collection[str]:
        """Nodes that will soon be gone, as far as Ray was told."""
        return self._room.draining_nodes()

    def start_standby(self, shard: int) -> tuple[Server, bool]:
        """A standby for a shard's server, and whether it is on another node.

        Raises NoRoom, ServerGone, GetTimeoutError if that node has no room for it after all,
        RayActorError.
        """
        with self._choosing:  # for several shards at once
            self._standby_nodes.pop(shard, None)
            crowded = Counter(server.node for server in self.primaries)
            standbys = self._standby_nodes.items()
            crowded.update(node for each, node in standbys if node != self.primaries[each].node)
            spot = self._room.for_standby(shard, self.primaries[shard].node, crowded)
            self._standby_nodes[shard] = spot.node
        actor = self._create(shard, spot.options)
        try:
            begun, serving = actor.begin.remote(), self.primaries[shard].serving
            ready, _ = ray.wait([begun, serving], timeout=START_TIMEOUT_S)
            if serving in ready:
                raise ServerGone
            address, node = ray.get(begun, timeout=0)
        except BaseException:
            ray.kill(actor)
            raise
        return Server(actor, address, node, actor.serve.remote()), spot.is_apart

    def _create(self, shard: int, options: dict[str, Any]) -> Any:
        config, tls = self._plan.config, self._tls
        num_threads = max(1, int(config.scaling.resources_per_server.get("CPU", 1)))
        is_paired = bool(config.scaling.replicas)
        replication = Replication(config.network, is_paired, tls.caller if tls else None)
        actor: Any = ServerActor.options(max_concurrency=2, **options).remote(
            self._plan.shard_config(shard),
            self._room.host,
            self._token,
            config.scaling.max_workers,
            num_threads,
            config.lanes,
            config.wire,
            tls.server if tls else None,
            replication if config.servers_may_move else None,
        )
        self._actors.append(actor)
        if self._is_killed:  # while it was made
            ray.kill(actor)
        return actor

    def kill(self) -> None:
        """End all that were ever started, and that others may yet start."""
        self._is_killed = True
        for actor in tuple(self._actors):
            ray.kill(actor)
