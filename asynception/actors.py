"""The Ray actors: thin shells around server, worker loop and coordinator."""

import itertools
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError

from asynception.building import build_flat, build_objective, open_train, train_loader
from asynception.config import TrainConfig
from asynception.journal import JournaledCoordinator
from ps.client import ParameterClient
from ps.consistency import Elastic
from ps.lanes.lane import LaneSettings
from ps.layout import Layout
from ps.malloc import tune_malloc
from ps.replicated import ReplicatedService
from ps.replication import StandbyLink, add_replication
from ps.retry import RetryPolicy
from ps.rules import warm_up
from ps.schedule import Clocks, Horizon
from ps.server import ShardServer
from ps.service import ShardService
from ps.shard import ShardConfig
from ps.tls import Identity
from ps.wire import WireSettings
from worker.data.lease import Lease
from worker.data.loader import Batch
from worker.elastic_steps import ElasticSteps
from worker.exchange import with_beats
from worker.gradient import GradientComputer
from worker.holdings import HeldCopy
from worker.local_steps import LocalSteps
from worker.loop import NodeWork, WorkerLoop
from worker.step_report import StepReport
from worker.straggler import Straggler

REPORT_EVERY_S = 0.25
"""Steps are reported together that often, so that the coordinator can serve many workers."""

REPORT_TIMEOUT_S = 10.0
"""A report that isn't answered for so long is sent again with the next one."""

LEASE_TIMEOUT_S = 120.0
"""A coordinator that doesn't answer for so long is gone. Ray starts it again in a few seconds, or
in many on a busy machine."""

STOP_GRACE_S = 1.0
"""For a pull of a server that another has taken the place of."""

_log = logging.getLogger(__name__)

CoordinatorActor = ray.remote(num_cpus=0)(JournaledCoordinator)


@dataclass(frozen=True)
class Connection:
    """What a process needs to reach all shards."""

    addresses: Sequence[str]
    layout: Layout
    token: str = field(repr=False)
    identity: Identity | None = None
    """What callers show; with TLS alone."""

    def open(self, config: TrainConfig) -> ParameterClient:
        """A client for control calls, and for what is rarely pulled or pushed."""
        return ParameterClient(
            self.addresses, self.layout, self.token, config.network, identity=self.identity
        )

    def open_lanes(self, config: TrainConfig) -> ParameterClient:
        """A worker's client, which has yet to connect."""
        return ParameterClient(
            self.addresses,
            self.layout,
            self.token,
            config.network,
            config.lanes,
            config.wire,
            self.identity,
        )

    def moved(self, shard: int, address: str) -> "Connection":
        """The same after a shard has moved."""
        addresses = list(self.addresses)
        addresses[shard] = address
        return replace(self, addresses=addresses)


@dataclass(frozen=True)
class Start:
    """How far the run was when a worker's life began."""

    horizon: Horizon
    clocks: Clocks


@dataclass(frozen=True)
class Replication:
    """What a server needs to have a standby, or to be one."""

    retry: RetryPolicy
    is_paired: bool
    """Whether it is to have one all the time; else only to move."""
    identity: Identity | None = None
    """What it shows its standby; with TLS alone."""


class ServerProcess:
    """One shard behind gRPC."""

    def __init__(
        self,
        config: ShardConfig,
        host: str | None,
        token: str,
        num_workers: int,
        num_threads: int,
        lanes: LaneSettings,
        wire: WireSettings,
        identity: Identity | None,
        replication: Replication | None = None,
    ) -> None:
        """`host`: address to bind to; None for the address by which Ray knows this node."""
        torch.set_num_threads(num_threads)
        tune_malloc()
        dtypes = (torch.float32, wire.push_dtype)
        warm_up(config.rule, dtypes, compensates=config.policy.compensation > 0)
        host = host or ray.util.get_node_ip_address()
        own = (host, token, num_workers, lanes, identity)
        if replication is None:
            self._server = ShardServer(ShardService(config), *own)
        else:
            self._server = _replicated_server(config, replication, *own)
        self._stopped = threading.Event()

    def begin(self) -> tuple[str, str]:
        """Serve the shard from now on: its address, and Ray's id of the node that it is on."""
        self._server.start()
        return self._server.address, str(ray.get_runtime_context().get_node_id())

    def serve(self) -> None:
        """Returns only after `stop`: whoever waits for this call learns of the actor's death."""
        self._stopped.wait()

    def stop(self) -> None:
        """Take no more calls, and end those under way, or let them end, if that is soon."""
        self._server.stop(STOP_GRACE_S)
        self._stopped.set()


def _replicated_server(
    config: ShardConfig,
    replication: Replication,
    host: str,
    token: str,
    num_workers: int,
    lanes: LaneSettings,
    identity: Identity | None,
) -> ShardServer:
    def connect(address: str) -> StandbyLink:
        return StandbyLink(address, token, replication.retry, lanes, replication.identity)

    service = ReplicatedService(config, is_paired=replication.is_paired)
    return ShardServer(
        service,
        host,
        token,
        num_workers,
        lanes,
        identity,
        lambda server: add_replication(server, service, connect),
    )


class WorkerProcess:
    """One life of a worker. While it runs, another thread answers what it holds, and is told where
    shards have moved to.

    At SIGTERM, and when it is told to, it leaves: it settles the push at hand and gives the rest of
    its lease back.
    """

    _loop: WorkerLoop | None = None
    _client: ParameterClient | None = None
    _reports: "Reports | None" = None
    _why_leaving: str | None = None
    _sigterm_before: Any = None

    def __init__(self, config: TrainConfig, num_classes: int, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        tune_malloc()
        self._config, self._num_classes = config, num_classes
        self._moving = threading.Lock()
        self._moves: dict[int, tuple[int, str]] = {}
        if threading.current_thread() is threading.main_thread():  # Ray's, in an actor's process
            self._sigterm_before = signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.leave("it got SIGTERM")

    def leave(self, why: str) -> None:
        """Have `run` return early, with this reason. Any thread may ask, at any time."""
        self._why_leaving = self._why_leaving or why
        if self._reports is not None:
            self._reports.stop()
        if self._loop is not None:
            self._leave_loop(self._loop)

    def _leave_loop(self, loop: WorkerLoop) -> None:
        loop.leave()

    def ready(self) -> None:
        """Returns once there is a process."""

    def run(
        self, worker: int, incarnation: int, connection: Connection, coordinator: Any, start: Start
    ) -> str | None:
        """Work until there is nothing left to lease, or until `leave`; returns why it left."""
        config, computer = self._config, self._computer(worker)
        self._reports = reports = Reports(worker, incarnation, coordinator)
        client = with_beats(lambda: self._opened(connection), reports.beat)
        announced = incarnation == 0 and not config.scaling.is_range
        if config.consistency.max_lead is not None and not announced:
            with_beats(lambda: client.enter(worker, incarnation), reports.beat)
        batches = self._batches(reports.leases())
        loop = WorkerLoop(
            worker,
            incarnation,
            computer,
            client,
            waits=config.consistency.waits,
            local=self._local_steps(computer, start),
            node=self._node(computer),
            batches_per_push=config.batches_per_process,
            pipeline=config.pipeline,
            beat=reports.beat,
        )
        self._loop = loop
        if self._why_leaving is not None:  # asked for before there was anything to tell
            self.leave(self._why_leaving)
        loop.run(batches, reports.add)
        reports.finish()
        client.close()
        return self._why_leaving

    def _opened(self, connection: Connection) -> ParameterClient:
        """Raises InputError for a lane that is forced and doesn't work."""
        client = connection.open_lanes(self._config)
        with self._moving:
            self._client = client
            for shard, (epoch, address) in self._moves.items():
                client.follow(shard, address, epoch)
        client.connect()
        return client

    def reroute(self, shard: int, address: str, epoch: int) -> None:
        """A shard is served there from now on; see `ShardClient.follow`."""
        with self._moving:
            newest = self._moves[shard] = max(self._moves.get(shard, (0, "")), (epoch, address))
            if self._client is not None:
                self._client.follow(shard, newest[1], newest[0])

    def _computer(self, worker: int) -> GradientComputer:
        config = self._config
        device = "cuda" if config.scaling.use_gpu else "cpu"
        flat = build_flat(config, self._num_classes, device)
        objective = build_objective(config, self._num_classes)
        clip_norm, factor = config.training.clip_norm, config.scaling.slow_workers.get(worker, 1.0)
        if factor > 1:
            return Straggler(flat, objective, clip_norm, config.compute, factor=factor)
        return GradientComputer(flat, objective, clip_norm, config.compute)

    def _batches(self, leases: Iterator[Lease]) -> Iterator[Batch]:
        """What this process computes gradients of."""
        return train_loader(self._config, open_train(self._config)).batches(leases)

    def _node(self, computer: GradientComputer) -> NodeWork | None:
        """What sums gradients up over the worker's processes, if it has several."""
        return None

    def held_version(self, shard: int) -> int | None:
        """The newest version of a shard's parameters that is here whole."""
        return self._loop.holdings.version(shard) if self._loop else None

    def held_copy(self, shard: int) -> HeldCopy | None:
        """The shard's part of that version."""
        return self._loop.holdings.copy(shard) if self._loop else None

    def _local_steps(self, computer: GradientComputer, start: Start) -> LocalSteps | None:
        config = self._config
        if not config.trains_locally:
            return None
        own = (computer, config.optimizer, config.schedule, start.horizon, start.clocks)
        if isinstance(config.consistency, Elastic):
            rate = config.consistency.rate(config.scaling.max_workers)
            return ElasticSteps(*own, rate, counts_pushes=config.scaling.is_range)
        return LocalSteps(*own)


class Reports:
    """A worker's line to the coordinator: leases one way, reports, a few together, the other.

    Both outlive the coordinator's death. Steps are kept until they are known to be counted, and one
    report is under way at a time.
    """

    def __init__(self, worker: int, incarnation: int, coordinator: Any) -> None:
        self._identity = (worker, incarnation)
        self._coordinator = coordinator
        self._steps: list[StepReport] = []
        self._under_way: Any = None
        self._sent_s = time.monotonic()
        self._stopped = False

    def stop(self) -> None:
        """Ask for no more leases. Any thread may say so."""
        self._stopped = True

    def leases(self) -> Iterator[Lease]:
        """Leases until the coordinator has none left, or until `stop`."""
        for number in itertools.count():
            if self._stopped:
                return
            call = self._coordinator.lease.remote(*self._identity, number)
            lease = ray.get(call, timeout=LEASE_TIMEOUT_S)
            if lease is None:
                return
            yield lease

    def add(self, step: StepReport) -> None:
        """Report a step, now or with the next ones."""
        self._steps.append(step)
        self.beat()

    def beat(self) -> None:
        """Report what there is, now and then; without steps, that this life goes on."""
        if time.monotonic() - self._sent_s >= REPORT_EVERY_S and self._may_send():
            self._send()

    def _may_send(self) -> bool:
        """Whether no report is under way, as far as can be told."""
        if self._under_way is None:
            return True
        try:
            self._settle(0)
        except GetTimeoutError:
            return time.monotonic() - self._sent_s >= REPORT_TIMEOUT_S
        return True

    def _send(self) -> None:
        self._under_way = self._coordinator.report.remote(*self._identity, tuple(self._steps))
        self._sent_s = time.monotonic()

    def _settle(self, timeout_s: float) -> None:
        """Forget the steps that the report under way told of. Raises GetTimeoutError."""
        following = ray.get(self._under_way, timeout=timeout_s)
        self._under_way = None
        kept = following is not None
        self._steps = [step for step in self._steps if kept and step.sequence >= following]

    def finish(self) -> None:
        """Have all steps counted: after the life's end they would be refused."""
        if self._under_way is not None:
            self._settle(LEASE_TIMEOUT_S)
        if self._steps:
            self._send()
            self._settle(LEASE_TIMEOUT_S)


ServerActor = ray.remote(ServerProcess)
WorkerActor = ray.remote(WorkerProcess)
