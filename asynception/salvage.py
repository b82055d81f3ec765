"""What is left of a session that lost one of its servers, and how a run goes on from there.

The other shards keep all that they have. The lost one's parameters and BN statistics are the
freshest that a worker still holds, its slots and averages those of the last checkpoint. Its clock
goes on where the other shards are, so that schedules and cuts stay in step; the updates between
are lost, and counted. So are the samples of pushes that the copy has, or one of the others, and
not all others: these are done again.
"""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from asynception.failures import SessionLost, one_line
from asynception.ledger import Position
from asynception.origin import Origin
from asynception.plan import RunPlan
from asynception.supervisor import Supervisor
from asynception.totals import Progress, Totals
from ps.client import ModelState, ahead, behind
from ps.layout import Layout
from ps.messages import ShardStatus, WorkerSequences
from ps.push import NewestPushes
from ps.retry import RetryPolicy, ShardUnavailable
from ps.schedule import Clocks
from ps.shard import Outcome, ShardState, vector_range
from ps.shard_client import ShardClient
from worker.holdings import HeldCopy

LOST = (RayActorError, ShardUnavailable, GetTimeoutError, SessionLost)
"""What ends a session after which another may begin."""

NUM_TRIES, PAUSE_S = 10, 0.1
"""To find a copy: a worker that is about to begin a step has none for a moment."""


class NothingLeft(Exception):
    """Why a run can't go on from what is left."""


@dataclass(frozen=True)
class Remains:
    """What was gathered."""

    shard: int
    """The lost one."""
    states: Mapping[int, ShardState]
    """Of all others, with every push that they took."""
    worker: int
    """The worker that holds `copy`."""
    copy: HeldCopy
    """The newest of the lost shard's parameters."""
    position: Position
    """What all others took is consumed, and nothing else."""
    totals: Totals
    """Without the updates that are lost, and `samples_twice`."""
    wall_s: float
    samples_twice: int = 0
    """Not consumed as of `position`, though one of the parts has them."""

    @property
    def clocks(self) -> list[Clocks]:
        """Of all shards. The lost one's is that of the one that is furthest behind."""
        clocks = {shard: state.clocks for shard, state in self.states.items()}
        least, version = min(clocks.values(), key=lambda each: each.updates), self.copy.version
        if version > least.updates:  # it was ahead; samples by the pace of the others
            samples = round(least.samples * version / max(1, least.updates))
            least = Clocks(version, samples)
        clocks[self.shard] = least
        return [clocks[shard] for shard in sorted(clocks)]

    @property
    def updates_lost(self) -> int:
        """Of the lost shard: what its clock counts and its parameters lack."""
        return self.clocks[self.shard].updates - self.copy.version


class Gathering:
    """Gathers what is left while a session's actors still live, in `failure.salvage_s`."""

    def __init__(self, plan: RunPlan, supervisor: Supervisor, coordinator: Any) -> None:
        self._plan, self._supervisor, self._coordinator = plan, supervisor, coordinator
        self._limit_s = plan.config.failure.salvage_s
        self._deadline_s = time.monotonic() + self._limit_s

    def gather(self, servers: Sequence[Any], origin: Origin, wall_s: float) -> Remains | None:
        """None if no server is lost. Raises NothingLeft.

        servers: Ray's references to their calls, which have ended where they are lost.
        origin: where the session began.
        """
        lost = [shard for shard, serving in enumerate(servers) if _has_ended(serving)]
        if not lost:
            return None
        self._check(lost, len(servers))
        try:
            progress: Progress = self._ask(self._coordinator.progress.remote())
            found = self._stop_others(lost[0])
            states = {shard: state for shard, (state, _) in found.items()}
            worker, copy = self._freshest(lost[0])
            of_others = [state.last_sequences for state in states.values()]
            everywhere = behind(of_others)
            somewhere = ahead([*of_others, sequences_of(copy.newest_pushes, everywhere)])
            position = self._ask(self._coordinator.position.remote(everywhere, False))
            twice = self._ask(self._coordinator.num_samples_twice.remote(everywhere, somewhere))
        except (grpc.RpcError, ShardUnavailable, GetTimeoutError, RayActorError) as error:
            raise NothingLeft(f"gathering it failed ({one_line(error)})") from error
        remains = Remains(lost[0], states, worker, copy, position, progress.totals, wall_s, twice)
        _count_outcomes(remains, [status for _, status in found.values()], origin)
        return remains

    def _check(self, lost: Sequence[int], num_servers: int) -> None:
        if not self._limit_s:
            raise NothingLeft("failure.salvage_s = 0")
        if self._plan.config.reduces:
            raise NothingLeft("in allreduce mode servers hold what was published alone")
        if len(lost) > 1 or num_servers == 1:
            raise NothingLeft(f"{len(lost)} of {num_servers} servers lost")

    def _left_s(self, share: float = 1.0) -> float:
        return max(0.01, share * (self._deadline_s - time.monotonic()))

    def _ask(self, call: Any) -> Any:
        return ray.get(call, timeout=self._left_s())

    def _stop_others(self, lost: int) -> dict[int, tuple[ShardState, ShardStatus]]:
        """Each other shard's state, and its counters, once it takes no more pushes."""
        retry = RetryPolicy(attempt_s=self._left_s(0.3), deadline_s=self._left_s(0.6))
        connection = self._supervisor.connection
        lives = {worker: life for worker, (life, _) in self._supervisor.lives.items()}
        clients = {
            shard: ShardClient(address, connection.token, retry, identity=connection.identity)
            for shard, address in enumerate(connection.addresses)
            if shard != lost
        }
        threads = ThreadPoolExecutor(len(clients), thread_name_prefix="salvage")
        calls = {shard: threads.submit(_stop, each, lives) for shard, each in clients.items()}
        try:
            return {shard: call.result() for shard, call in calls.items()}
        finally:
            for client in clients.values():
                client.close()
            threads.shutdown(wait=False)

    def _freshest(self, shard: int) -> tuple[int, HeldCopy]:
        """The newest copy, and the worker that holds it."""
        for _ in range(NUM_TRIES):
            actors = {worker: actor for worker, (_, actor) in self._supervisor.lives.items()}
            asked = {worker: each.held_version.remote(shard) for worker, each in actors.items()}
            versions = {worker: self._answer(call) for worker, call in asked.items()}
            known = {worker: each for worker, each in versions.items() if each is not None}
            for worker in sorted(known, key=lambda each: known[each], reverse=True):
                copy: HeldCopy | None = self._answer(actors[worker].held_copy.remote(shard))
                if copy is not None:
                    return worker, copy
            time.sleep(PAUSE_S)
        raise NothingLeft("no worker holds the lost server's parameters")

    def _answer(self, call: Any) -> Any:
        """None from a worker that is gone, or says nothing in time."""
        try:
            return ray.get(call, timeout=self._left_s(0.3))
        except RayError:
            return None


def _has_ended(serving: Any) -> bool:
    ready, _ = ray.wait([serving], timeout=0)
    return bool(ready)


def _stop(shard: ShardClient, lives: Mapping[int, int]) -> tuple[ShardState, ShardStatus]:
    """The state with all that the shard ever took of these workers' lives, and its counters."""
    for worker, incarnation in lives.items():
        shard.fence(worker, incarnation + 1)
    status = shard.describe()
    shard.cut("salvage", 0, 0.0, ())
    return shard.read("salvage", lambda _, numel: torch.empty(numel)), status


def sequences_of(newest: NewestPushes, everywhere: WorkerSequences) -> dict[int, dict[int, int]]:
    """What a copy has of each life that all others know.

    Of lives before a worker's newest it has all that they were held to when they ended.
    """
    found = {}
    for worker, (incarnation, sequence) in newest.items():
        ended = [life for life in everywhere.get(worker, {}) if life < incarnation]
        found[worker] = {**dict.fromkeys(ended, sys.maxsize), incarnation: sequence}
    return found


def _count_outcomes(remains: Remains, statuses: Sequence[ShardStatus], origin: Origin) -> None:
    """Receipts by the shards' own count; the lost one's, but for updates, as workers reported."""
    others = sum((Counter(status.pushes) for status in statuses), Counter[str]())
    start = origin.shard_clocks[remains.shard] if origin.shard_clocks else origin.state.clocks
    outcomes, before = remains.totals.outcomes, origin.totals.outcomes
    for name, count in others.items():
        outcomes[name] = max(outcomes[name], before[name] + count)
    name = Outcome.APPLIED.value
    updates = remains.clocks[remains.shard].updates - start.updates
    outcomes[name] = before[name] + others[name] + updates


def assemble(layout: Layout, remains: Remains, base: Origin) -> Origin:
    """Where to go on; `base`, which is left as it is, is the last checkpoint, or the start.

    Raises NothingLeft if that has the lost shard's parameters as new as any worker.
    """
    version = remains.copy.version
    if version <= base.state.clocks.updates:
        raise NothingLeft(
            f"worker {remains.worker} has server {remains.shard}'s parameters as of {version} "
            f"updates, and none has newer ones than {base.checkpoint or 'the start'}"
        )
    vectors = {name: vector.clone() for name, vector in base.state.vectors.items()}
    of_copy = {"parameters": remains.copy.parameters, "statistics": remains.copy.statistics}
    parts = {shard: state.vectors for shard, state in remains.states.items()}
    for shard, part in {**parts, remains.shard: of_copy}.items():
        for name, vector in part.items():
            vectors[name][vector_range(layout.shards[shard], name).slice()].copy_(vector)
    clocks, totals = remains.clocks, remains.totals.copy()
    if remains.updates_lost:
        totals.updates_lost[remains.shard] += remains.updates_lost
    totals.samples_twice += remains.samples_twice
    least = min(clocks, key=lambda each: each.updates)
    skew = max(each.updates for each in clocks) - least.updates
    state = ModelState(least, vectors, {}, skew)
    return Origin(state, remains.position, totals, remains.wall_s, clocks, base.checkpoint)


def described(remains: Remains, base: Origin, pull: str) -> str:
    """What people are told. pull: dtype in which parameters travel."""
    shard, version = remains.shard, remains.copy.version
    rounded = "" if pull == "float32" else f", rounded to {pull}"
    twice = remains.samples_twice
    again = f"; {twice} samples are trained on twice somewhere" if twice else ""
    return (
        f"server {shard} lost {remains.updates_lost} updates, the others none: it has the "
        f"parameters that worker {remains.worker} pulled at version {version}{rounded}, and slots "
        f"and EMA of {base.checkpoint or 'the start'}{again}"
    )
