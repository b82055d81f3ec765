"""Keeps a standby beside each server, and puts it in the server's place when that one is lost.

One thread looks after one shard. It alone says which server is what, by epochs that rise, so a
server that was given up, and is alive, can't write, nor answer once it has heard of its fate
(docs/replicas.md).
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from asynception.actors import Connection
from asynception.failures import SessionLost, TrainingFailed, one_line
from asynception.plan import RunPlan
from asynception.servers import Server, Servers
from ps.messages import ReplicaStatus
from ps.replication import ReplicationClient
from ps.retry import RetryPolicy, ShardUnavailable
from ps.shard_client import ShardClient

WATCH_S = 2.0
"""From one look at a shard's servers to the next; deaths are noticed at once."""

ASK_S, ASK_AGAIN_S = 5.0, 1.0
"""How long a server may take to answer, and for how long it is then asked again at once."""

START_AGAIN_S = 10.0
"""After a standby could not be made."""

FIRST_EPOCH = 1
"""In which a server gets its first standby."""

Moved = Sequence[Callable[[int, str, int], None]]
"""Each is told of a shard, the address where it is served from now on, and the epoch."""

_log = logging.getLogger(__name__)


class Failover:
    """All shards of a session; without replicas it only says which servers are there."""

    def __init__(
        self,
        plan: RunPlan,
        servers: Servers,
        connection: Connection,
        moved: Moved,
        report: Callable[[str], None],
    ) -> None:
        """report: told of what happened, in words, by the thread that calls this object."""
        self._replicas = plan.config.scaling.replicas
        num_shards = len(servers.primaries) if self._replicas else 0
        self._report, self._events = report, deque[str]()
        tell = self._events.append
        self._keepers = [
            _Keeper(shard, plan, servers, connection, moved, tell) for shard in range(num_shards)
        ]
        self._servers = servers
        self._threads = ThreadPoolExecutor(max(1, num_shards), thread_name_prefix="failover")
        self._running: list[Future[None]] = []

    @property
    def serving(self) -> list[Any]:
        """See `Servers.serving`."""
        return self._servers.serving

    @property
    def watched(self) -> list[Any]:
        """Ray references whose end is the session's: those of servers without a standby."""
        return [] if self._replicas else self._servers.serving

    @property
    def unserved_s(self) -> float:
        """Since all shards were last known to answer pushes; 0 without replicas."""
        return max((keeper.unserved_s for keeper in self._keepers), default=0.0)

    def begin(self) -> None:
        """Make the first standbys, and go on to look after them."""
        self._servers.attend()
        first = [self._threads.submit(keeper.begin) for keeper in self._keepers]
        for each in first:
            each.result()
        if self._keepers and not all(keeper.is_apart for keeper in self._keepers):
            self._report(
                "scaling.replicas = 1: standbys are on the nodes of their servers, as no other is "
                "large enough: a run outlives a server's process, and not its node"
            )
        self._running = [self._threads.submit(keeper.keep) for keeper in self._keepers]

    def check(self) -> None:
        """Report what happened.

        Raises SessionLost if a shard is lost, TrainingFailed if a standby differs.
        """
        self._report_events()
        for each in self._running:
            if each.done():
                each.result()

    def stop(self) -> None:
        """Look after nothing any more."""
        for keeper in self._keepers:
            keeper.stop()
        self._report_events()
        self._threads.shutdown(wait=False)

    def _report_events(self) -> None:
        while self._events:
            self._report(self._events.popleft())


class _Keeper:
    """Looks after one shard's pair of servers."""

    def __init__(
        self,
        shard: int,
        plan: RunPlan,
        servers: Servers,
        connection: Connection,
        moved: Moved,
        tell: Callable[[str], None],
    ) -> None:
        self._shard, self._config, self._servers = shard, plan.config, servers
        self._connection, self._moved, self._tell = connection, moved, tell
        self._standby: Server | None = None
        attempt_s = min(ASK_S, plan.config.network.attempt_s)
        self._patience = RetryPolicy(attempt_s=attempt_s, deadline_s=ASK_AGAIN_S, backoff_s=0.1)
        self._epoch = 0
        self._heard_s = self._again_s = self._served_s = time.monotonic()
        self._is_stopped = self._is_making = False
        self._clients: dict[str, ReplicationClient] = {}
        self._asking = self._asker(self._primary.address)
        self.is_apart = True

    @property
    def _primary(self) -> Server:
        return self._servers.primaries[self._shard]

    @property
    def unserved_s(self) -> float:
        """Since the primary last answered that it waits for nothing. Any thread may ask."""
        return 0.0 if self._is_making else time.monotonic() - self._served_s

    def stop(self) -> None:
        """Ends what is under way."""
        self._is_stopped = True
        self._asking.close()
        for client in tuple(self._clients.values()):
            client.close()

    def begin(self) -> None:
        """Make the first standby, if that is possible now."""
        try:
            self._make_standby()
        except (ShardUnavailable, grpc.RpcError, RayActorError) as error:
            _log.info("shard %d: %s", self._shard, one_line(error))  # `keep` finds the same

    def keep(self) -> None:
        """Until `stop`. Raises SessionLost if both servers are lost, TrainingFailed."""
        while not self._is_stopped:
            try:
                self._look()
            except (ShardUnavailable, grpc.RpcError, RayActorError) as error:
                if not self._is_stopped:
                    _log.info("shard %d: %s; looking again", self._shard, one_line(error))

    def _look(self) -> None:
        standby = self._standby
        both = [self._primary.serving, *([standby.serving] if standby else [])]
        ready, _ = ray.wait(both, timeout=WATCH_S)
        if self._is_stopped:
            return
        if self._primary.serving in ready:
            self._promote("died")
        elif standby is not None and standby.serving in ready:
            self._give_up_standby("died")
        else:
            self._ask()

    def _ask(self) -> None:
        status = self._status()
        if status is None:
            self._promote_if_silent()
            return
        if status.error:
            raise TrainingFailed(
                f"server {self._shard} and its standby differ, so one of them is wrong: "
                f"{status.error} (docs/replicas.md)"
            )
        if self._standby is None:
            if time.monotonic() >= self._again_s:
                self._is_making = True  # which takes its time, while the primary answers
                try:
                    self._make_standby()
                finally:
                    self._served_s, self._is_making = time.monotonic(), False
        elif status.state == "in_step" and status.waiting_s > self._config.failure.server_timeout_s:
            self._give_up_standby(f"kept its server waiting for {status.waiting_s:.0f} s")

    def _status(self) -> ReplicaStatus | None:
        """How the primary says that the standby is doing; None if it says nothing."""
        try:
            status = self._asking.describe().replica
        except ShardUnavailable:
            return None
        self._heard_s = time.monotonic()
        self._served_s = self._heard_s - (status.waiting_s if status else 0.0)
        return status

    def _promote_if_silent(self) -> None:
        silent_s = time.monotonic() - self._heard_s
        if silent_s > self._config.failure.server_timeout_s and self._standby is not None:
            self._promote(f"gave no answer for {silent_s:.0f} s")

    def _promote(self, why: str) -> None:
        """Put the standby in the primary's place."""
        lost, standby = self._primary, self._standby
        what = f"server {self._shard} {why}"
        if standby is None:
            raise SessionLost(f"{what}, and had no standby yet")
        self._epoch += 1
        version = self._promoted(standby, what)
        self._servers.primaries[self._shard], self._standby = standby, None
        self._asking.close()
        self._asking = self._asker(standby.address)
        self._heard_s = self._again_s = self._served_s = time.monotonic()
        for follow in self._moved:
            follow(self._shard, standby.address, self._epoch)
        self._tell(
            f"{what}; its standby goes on at version {version}, with all that had been answered"
        )
        ray.kill(lost.actor)
        self._retire(lost)

    def _promoted(self, standby: Server, what: str) -> int:
        """There is no way back once it has been asked: it is asked until it answers, or dies."""
        while not self._is_stopped:
            try:
                return self._client(standby).promote(self._epoch)
            except ShardUnavailable as error:
                if ray.wait([standby.serving], timeout=0)[0]:
                    raise SessionLost(f"{what}, and so did its standby") from error
            except grpc.RpcError as error:
                raise SessionLost(f"{what}, and its standby was not in step") from error
        raise SessionLost(f"{what} when the session ended")

    def _retire(self, lost: Server) -> None:
        """Tell one that may be alive, if it can be reached; else its standby does, when it next
        writes."""
        try:
            self._client(lost).retire(self._epoch)
        except (ShardUnavailable, grpc.RpcError) as error:
            _log.info("a lost server can't be told so: %s", one_line(error))
        finally:
            self._forget(lost)

    def _give_up_standby(self, why: str) -> None:
        lost, self._standby = self._standby, None
        assert lost is not None
        self._epoch += 1
        self._again_s = time.monotonic()
        self._tell(f"the standby of server {self._shard} {why}; another one is made")
        ray.kill(lost.actor)
        self._forget(lost)
        # If this gets lost, the primary waits on, until the next standby is attached.
        self._client(self._primary).detach(self._epoch)

    def _make_standby(self) -> None:
        """Start one, and have the primary seed it. Tries again later if it can't be had now."""
        self._again_s = time.monotonic() + START_AGAIN_S
        try:
            server, self.is_apart = self._servers.start_standby(self._shard)
        except (GetTimeoutError, RayActorError) as error:
            self._tell(
                f"server {self._shard} has no standby: none could be started "
                f"({one_line(error)}); trying again in {START_AGAIN_S:.0f} s"
            )
            return
        self._epoch += 1
        if self._attached(server):
            self._standby = server
            if self._epoch > FIRST_EPOCH:
                self._tell(f"server {self._shard} has a standby again")
            return
        ray.kill(server.actor)
        self._forget(server)
        self._again_s = time.monotonic()
        self._epoch += 1
        self._client(self._primary).detach(self._epoch)

    def _attached(self, standby: Server) -> bool:
        """Have the primary seed a standby; False if it can't, or one of them is gone."""
        both = [self._primary.serving, standby.serving]
        while not self._is_stopped and not ray.wait(both, timeout=0)[0]:
            try:
                self._client(self._primary).attach(standby.address, self._epoch)
            except ShardUnavailable:  # it goes on, or one of them is gone
                continue
            except grpc.RpcError as error:
                self._tell(f"a standby of server {self._shard} was not seeded: {one_line(error)}")
                return False
            self._heard_s = time.monotonic()
            return True
        return False

    def _client(self, server: Server) -> ReplicationClient:
        if server.address not in self._clients:
            self._clients[server.address] = ReplicationClient(
                server.address,
                self._connection.token,
                self._patience,
                identity=self._connection.identity,
            )
        return self._clients[server.address]

    def _asker(self, address: str) -> ShardClient:
        connection = self._connection
        return ShardClient(address, connection.token, self._patience, identity=connection.identity)

    def _forget(self, server: Server) -> None:
        client = self._clients.pop(server.address, None)
        if client is not None:
            client.close()
