"""Looks after one shard's servers: keeps a standby, and puts it in the server's place when that one
is lost, or has to leave its node.

Its thread alone says which server is what, by epochs that rise, so a server that was given up, and
is alive, can't write, nor answer once it has heard of its fate (docs/replicas.md).
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence

import grpc
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from asynception.actors import Connection
from asynception.failures import SessionLost, TrainingFailed, one_line
from asynception.plan import RunPlan
from asynception.servers import Server, ServerGone, Servers
from asynception.spots import NoRoom
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

STOP_S = 5.0
"""For a server to end what it answers, once another has its place."""

FIRST_EPOCH = 1
"""In which a server gets its first standby."""

Moved = Sequence[Callable[[int, str, int], None]]
"""Each is told of a shard, the address where it is served from now on, and the epoch."""

_log = logging.getLogger(__name__)


class _NotPromoted(Exception):
    """A standby did not take the server's place; what it says follows a server's name."""


class Keeper:
    """Looks after one shard."""

    def __init__(
        self,
        shard: int,
        plan: RunPlan,
        servers: Servers,
        connection: Connection,
        moved: Moved,
        tell: Callable[[str], None],
        leaving: Callable[[], Collection[str]],
    ) -> None:
        """leaving: nodes that will soon be gone."""
        self._shard, self._config, self._servers = shard, plan.config, servers
        self._connection, self._moved = connection, moved
        self._tell, self._leaving = tell, leaving
        self._is_paired = bool(plan.config.scaling.replicas)
        self._standby: Server | None = None
        attempt_s = min(ASK_S, plan.config.network.attempt_s)
        self._patience = RetryPolicy(attempt_s=attempt_s, deadline_s=ASK_AGAIN_S, backoff_s=0.1)
        self._epoch = 0
        self._heard_s = self._again_s = time.monotonic()
        self._is_stopped = self._may_be_fenced = False
        self._told_of = ""
        self._clients: dict[str, ReplicationClient] = {}
        self._asking = self._asker(self._primary.address)
        self.is_apart = True
        self.num_moves = 0

    @property
    def _primary(self) -> Server:
        return self._servers.primaries[self._shard]

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
        elif self._ask():
            self._heed_notices()

    def _ask(self) -> bool:
        """How both are; whether the primary says anything."""
        try:
            status = self._asking.describe().replica or ReplicaStatus(self._epoch, "none")
        except ShardUnavailable:
            self._promote_if_silent()
            return False
        self._heard_s, self._may_be_fenced = time.monotonic(), False
        if status.error:
            raise TrainingFailed(
                f"server {self._shard} and its standby differ, so one of them is wrong: "
                f"{status.error} (docs/replicas.md)"
            )
        if self._standby is None:
            if self._is_paired:
                self._make_standby_if_due()
        elif status.state == "in_step" and status.waiting_s > self._config.failure.server_timeout_s:
            self._give_up_standby(f"kept its server waiting for {status.waiting_s:.0f} s")
        return True

    def _heed_notices(self) -> None:
        """Have no server where it will soon be gone, as far as there is another node."""
        if self._must_leave(self._standby) or (
            self._standby is None and self._must_leave(self._primary)
        ):
            self._make_standby_if_due()
        if self._must_leave(self._primary) and not self._must_leave(self._standby):
            self._move()

    def _must_leave(self, server: Server | None) -> bool:
        return server is not None and server.node in self._leaving()

    def _promote_if_silent(self) -> None:
        silent_s = time.monotonic() - self._heard_s
        may_be_lost = self._standby is not None or self._may_be_fenced
        if silent_s > self._config.failure.server_timeout_s and may_be_lost:
            self._promote(f"gave no answer for {silent_s:.0f} s")

    def _promote(self, why: str) -> None:
        """Put the standby in the place of a primary that is lost."""
        lost, standby = self._primary, self._standby
        what = f"server {self._shard} {why}"
        if standby is None:
            raise SessionLost(f"{what}, and had no standby yet" if self._is_paired else what)
        try:
            version = self._promoted(standby)
        except _NotPromoted as error:
            raise SessionLost(f"{what}, and its standby {error}") from error
        self._follow(standby)
        self._tell(
            f"{what}; its standby goes on at version {version}, with all that had been answered"
        )
        ray.kill(lost.actor)
        self._retire(lost)

    def _move(self) -> None:
        """Put the standby in the place of a primary that is as well, and is to leave its node.

        While both go on, nothing is answered but what the standby has; once that one is asked, it
        takes nothing more from the other. Nobody calls it before the other has heard so, which may
        read a push in its worker's memory until then.
        """
        left, standby = self._primary, self._standby
        if standby is None:
            return
        try:
            version = self._promoted(standby)
        except _NotPromoted as error:  # the primary goes on, unless it has heard of it
            if self._is_stopped:
                return
            self._may_be_fenced = True
            self._give_up_standby(str(error))
            return
        self._retire(left)
        self._follow(standby)
        self.num_moves += 1
        self._tell(
            f"server {self._shard} moved to another node at version {version}: its node is being "
            "drained"
        )
        self._part_with(left)

    def _follow(self, standby: Server) -> None:
        """Have everybody call the standby, which was promoted."""
        self._servers.primaries[self._shard], self._standby = standby, None
        self._asking.close()
        self._asking = self._asker(standby.address)
        self._heard_s = self._again_s = time.monotonic()
        for follow in self._moved:
            follow(self._shard, standby.address, self._epoch)

    def _promoted(self, standby: Server) -> int:
        """The version at which it goes on. Raises _NotPromoted.

        There is no way back once it has been asked: it is asked until it answers, or dies.
        """
        self._epoch += 1
        while not self._is_stopped:
            try:
                return self._client(standby).promote(self._epoch)
            except ShardUnavailable as error:
                if _has_ended(standby):
                    raise _NotPromoted("died") from error
            except grpc.RpcError as error:
                raise _NotPromoted("was not in step") from error
        raise _NotPromoted("was told to end")

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

    def _make_standby_if_due(self) -> None:
        if time.monotonic() >= self._again_s:
            self._make_standby()

    def _make_standby(self) -> None:
        """Start one, and have the primary seed it, in place of one that has to leave its node.

        Tries again later if it can't be had now.
        """
        self._again_s = time.monotonic() + START_AGAIN_S
        server = self._started()
        if server is None:
            return
        if self._standby is not None and _has_ended(self._primary):
            ray.kill(server.actor)  # the one that there is has all
            return
        self._again_s = time.monotonic()
        before, self._standby = self._standby, None
        self._epoch += 1
        is_attached = self._attached(server)
        if is_attached:
            self._standby = server
            self._tell_of_standby(before)
        if before is not None:
            self._part_with(before)
        if not is_attached:
            ray.kill(server.actor)
            self._forget(server)
            self._epoch += 1
            self._client(self._primary).detach(self._epoch)

    def _started(self) -> Server | None:
        """A server on another node if there is one; None if none can be had now."""
        try:
            server, self.is_apart = self._servers.start_standby(self._shard)
        except ServerGone:
            return None
        except NoRoom as error:
            self._tell_once(
                f"server {self._shard} stays where it is, on a node that is being drained: "
                f"{error}; looking again every {START_AGAIN_S:.0f} s"
            )
            return None
        except (GetTimeoutError, RayActorError) as error:
            self._tell(
                f"server {self._shard} has no standby: none could be started "
                f"({one_line(error)}); trying again in {START_AGAIN_S:.0f} s"
            )
            return None
        self._told_of = ""
        return server

    def _tell_once(self, text: str) -> None:
        if text != self._told_of:
            self._tell(text)
        self._told_of = text

    def _tell_of_standby(self, before: Server | None) -> None:
        if before is not None:
            self._tell(
                f"the standby of server {self._shard} moved to another node: its node is being "
                "drained"
            )
        elif self._is_paired and self._epoch > FIRST_EPOCH:
            self._tell(f"server {self._shard} has a standby again")

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

    def _part_with(self, server: Server) -> None:
        """End one that nobody needs any more, and not in the middle of an answer."""
        server.actor.stop.remote()
        ray.wait([server.serving], timeout=STOP_S)
        ray.kill(server.actor)
        self._forget(server)

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


def _has_ended(server: Server) -> bool:
    return bool(ray.wait([server.serving], timeout=0)[0])
