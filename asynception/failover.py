"""Keeps a session's shards served when servers are lost, or have to leave their nodes."""

from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import ray

from asynception.actors import Connection
from asynception.keeper import Keeper, Moved
from asynception.plan import RunPlan
from asynception.servers import Servers


class Failover:
    """All shards of a session, each with a keeper in a thread of its own, where it needs one: with
    replicas from the start, else from the moment on when its server's node is being drained."""

    def __init__(
        self,
        plan: RunPlan,
        servers: Servers,
        connection: Connection,
        moved: Moved,
        report: Callable[[str], None],
    ) -> None:
        """report: told of what happened, in words, by the thread that calls this object."""
        self._config, self._servers = plan.config, servers
        self._report, self._events = report, deque[str]()
        self._leaving: Collection[str] = ()
        self._told_of_the_fixed = False
        tell, leaving = self._events.append, lambda: self._leaving
        self._make = partial(
            Keeper,
            plan=plan,
            servers=servers,
            connection=connection,
            moved=moved,
            tell=tell,
            leaving=leaving,
        )
        shards = range(len(servers.primaries)) if plan.config.scaling.replicas else ()
        self._keepers = {shard: self._make(shard) for shard in shards}
        num_threads = len(servers.primaries)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="failover")
        self._running: list[Future[None]] = []

    @property
    def serving(self) -> list[Any]:
        """See `Servers.serving`."""
        return self._servers.serving

    @property
    def watched(self) -> list[Any]:
        """Ray references whose end is the session's: those of servers without a keeper."""
        return [each for shard, each in enumerate(self.serving) if shard not in self._keepers]

    def is_lost(self, shard: int) -> bool:
        """Whether a shard's server has ended, and no other takes its place. Any thread may ask."""
        serving = self.serving[shard]
        if shard in self._keepers or serving is None:
            return False
        return bool(ray.wait([serving], timeout=0)[0])

    @property
    def may_have_moved(self) -> bool:
        """Whether a shard may be served elsewhere than a call that failed had it."""
        return bool(self._keepers)

    @property
    def num_moves(self) -> int:
        """Servers that left their nodes in time."""
        return sum(keeper.num_moves for keeper in self._keepers.values())

    def begin(self) -> None:
        """Make the first standbys, and go on to look after them."""
        self._servers.attend()
        first = [self._threads.submit(keeper.begin) for keeper in self._keepers.values()]
        for each in first:
            each.result()
        if not all(keeper.is_apart for keeper in self._keepers.values()):
            self._report(
                "scaling.replicas = 1: standbys are on the nodes of their servers, as no other is "
                "large enough: a run outlives a server's process, and not its node"
            )
        self._running = [self._threads.submit(each.keep) for each in self._keepers.values()]

    def check(self) -> None:
        """Heed notices, and report what happened. To be called often.

        Raises SessionLost if a shard is lost, TrainingFailed if a standby differs.
        """
        self._heed_notices()
        self._report_events()
        for each in self._running:
            if each.done():
                each.result()

    def _heed_notices(self) -> None:
        """Give a keeper to each server whose node will soon be gone."""
        self._leaving = leaving = self._servers.leaving()
        for shard, server in enumerate(self._servers.primaries if leaving else ()):
            if server.node not in leaving or shard in self._keepers:
                continue
            if self._config.servers_may_move:
                self._keepers[shard] = keeper = self._make(shard)
                self._running.append(self._threads.submit(keeper.keep))
            elif not self._told_of_the_fixed:
                self._told_of_the_fixed = True
                self._report(self._why_fixed(shard))

    def _why_fixed(self, shard: int) -> str:
        by = "consistency.delay_compensation" if self._config.consistency.compensation else ""
        by = by or f'consistency.mode = "{self._config.consistency.mode}"'
        return (
            f"the node of server {shard} is being drained, and with {by} servers can't move: it "
            "will be lost with its node (docs/elastic.md)"
        )

    def stop(self) -> None:
        """Look after nothing any more."""
        for keeper in self._keepers.values():
            keeper.stop()
        self._report_events()
        self._threads.shutdown(wait=False)

    def _report_events(self) -> None:
        while self._events:
            self._report(self._events.popleft())
