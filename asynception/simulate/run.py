"""One seed's run: the real trainer, session and supervisor, among simulated surroundings."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from asynception import trainer
from asynception.controls import Controls
from asynception.ledger import Position
from asynception.orders import Orders
from asynception.origin import Origin, origin_from
from asynception.plan import RunPlan
from asynception.report import Reporter
from asynception.salvage import Remains, assemble, described
from asynception.session import Ending, Session
from asynception.simulate import world as worlds
from asynception.simulate.channel import Wires
from asynception.simulate.chaos import Chaos
from asynception.simulate.cluster import ActorClass, SimulatedRay, SimulatedRoom
from asynception.simulate.hosts import Hosts
from asynception.simulate.network import Network
from asynception.simulate.parties import (
    COORDINATOR_CALLS,
    Computer,
    Loader,
    MemoryJournal,
    SimulatedEvaluator,
    SimulatedWorker,
    Vectors,
    WatchedClient,
    WatchedCoordinator,
)
from asynception.simulate.scenario import CHUNK_NUM_BYTES, Scenario, draw, first_state, plan_of
from asynception.simulate.servers import SimulatedServer
from asynception.simulate.waiting import Chain, Executor
from asynception.simulate.watch import Saved, Watch
from asynception.simulate.world import NoProgress, Party, World
from ps.client import ModelState
from ps.layout import Layout
from ps.replication import ReplicationClient
from ps.shard_client import ShardClient

LIMIT_S = 3000.0
"""Virtual seconds for a run that takes a minute or two."""

LEASE_TIMEOUT_S = 10.0

BEAT_S = 10.0
"""Often enough for `worker_timeout_s` of the scenarios, and fewer calls to simulate."""

SEED_MESSAGE_S = 0.15
"""Of an image, which has some ten: it is larger than a push, in which few fit into that time."""

ONCE = frozenset(
    {"/asynception.Bytes/Load"}
    | {f"/asynception.ParameterServer/{name}" for name in ("Cut", "Release")}
)
"""Calls that are carried out in time and once, or not at all: they are not safe to repeat late."""


@dataclass(frozen=True)
class Report:
    """What a run that kept all its promises did."""

    seed: int
    mode: str
    virtual_s: float
    num_sessions: int
    num_worker_deaths: int
    num_coordinator_deaths: int
    """That a session outlived."""
    num_checkpoints: int
    num_salvages: int
    """Sessions that began with what was left of the one before."""
    num_promotions: int
    """Of standbys."""
    num_moves: int
    """Of servers whose node was drained."""
    num_settled: int
    """First receipts of all shards and sessions."""
    trace: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of the trace."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()


class SeedFailed(AssertionError):
    """The run of a seed broke a promise; `__cause__` says which."""

    def __init__(self, seed: int, trace: list[str], error: BaseException) -> None:
        super().__init__(f"seed {seed}: {type(error).__name__}: {error}")
        self.seed, self.trace = seed, trace


@dataclass
class _Checkpoint:
    state: ModelState
    metadata: dict[str, Any]
    saved: Saved


class _Run(trainer._Run):
    """The trainer's loop over sessions, without a folder."""

    def __init__(self, plan: RunPlan, simulation: "Simulation") -> None:
        workers = SimulatedRoom(simulation.ray, plan.config.scaling.max_workers)
        room = SimpleNamespace(
            host=None,
            for_server=simulation.hosts.for_server,
            for_standby=simulation.hosts.for_standby,
            for_worker=lambda worker: {},
            for_evaluator=dict,
            for_coordinator=dict,
            worker_resources={"CPU": 1.0},
            workers=workers,
            worker_nodes=workers.nodes,
            draining_nodes=lambda: simulation.ray.draining,
            evaluated=simulation.ray.get,
        )
        controls = Controls(orders=simulation.orders)
        reservation = SimpleNamespace(room=room, lacks=lambda plan: None)
        super().__init__(plan, cast(Any, reservation), Path("run"), controls)
        self._simulation = simulation

    def _origin(self) -> Origin:
        return self._simulation.origin()

    def _finished(self, ending: Ending) -> Any:
        return ending

    @property
    def num_worker_deaths(self) -> int:
        return self._worker_failures


class _Reporter:
    """Events go into the trace."""

    def __init__(self, world: World) -> None:
        self._world = world

    def event(self, text: str) -> None:
        self._world.note(text)
        # No fault lasts as long as `worker_timeout_s`, and who waits for others says so.
        if "was silent" in text:
            self._world.fail(NoProgress(text))

    def progress(self, progress: object) -> None:
        """Not of interest."""

    def attend(self, shards: object) -> None:
        """Asks the shards nothing."""

    def checkpoint(self, name: str, took_s: float) -> None:
        self.event(f"checkpoint {name}")

    def evaluation(self, samples: int, updates: int, *_: object) -> None:
        self._world.note(f"evaluated at {samples} samples, {updates} updates")


class Simulation:
    """All that one seed's run consists of."""

    def __init__(self, scenario: Scenario, *, harsh: bool = False) -> None:
        """harsh: calls that change a shard for good may come late or twice as well."""
        self.scenario = scenario
        self.world = World(scenario.seed, LIMIT_S)
        self.driver = Party("driver")
        network = Network(self.world, scenario.weather)
        self.wires = Wires(self.world, network)
        self.wires.once = frozenset() if harsh else ONCE
        self.wires.slow = {"/asynception.Bytes/Seed": SEED_MESSAGE_S}
        self.ray = SimulatedRay(self.world, network, self.driver)
        self.watch = Watch(scenario)
        self._plan = plan_of(scenario)
        self._checkpoints: list[_Checkpoint] = []
        self._salvaged: tuple[Origin, Saved] | None = None
        self._read_states: dict[str, Any] = {}
        self.ray.joins_s = scenario.joins_s
        self.orders = Orders(self.world.clock)
        max_workers = scenario.config.scaling.max_workers
        self.hosts = Hosts(self.world, self.ray, scenario.num_hosts)
        self._chaos = Chaos(
            self.world, network, self.ray, self.hosts, scenario.faults, self.orders, max_workers
        )

    def run(self) -> Report:
        """Raises SeedFailed."""
        worlds.enter(self.world)
        try:
            with self._seams():
                self._chaos.begin()
                run = _Run(self._plan, self)
                self.world.run(self.driver, lambda: self._train(run))
        except Exception as error:
            raise SeedFailed(self.scenario.seed, self.world.trace, error) from error
        finally:
            worlds.leave()
        watch = self.watch
        return Report(
            self.scenario.seed,
            self.scenario.config.consistency.mode,
            self.world.now_s,
            watch.session + 1,
            run.num_worker_deaths,
            self.ray.num_returns,
            watch.num_checkpoints,
            watch.num_salvages,
            sum("its standby goes on" in line for line in self.world.trace),
            sum(" moved to another node at version" in line for line in self.world.trace),
            watch.num_settled + sum(len(shard.settled) for shard in watch.shards.values()),
            tuple(self.world.trace),
        )

    def _train(self, run: _Run) -> None:
        reporter = cast(Reporter, _Reporter(self.world))
        ending = cast(Ending, run._attempt_until_done(run._origin(), reporter))
        self.watch.check_end(ending.progress.totals)

    def origin(self) -> Origin:
        """The last checkpoint, or the start."""
        if not self._checkpoints:
            return Origin(first_state(self._plan))
        last = self._checkpoints[-1]
        state = ModelState(last.state.clocks, last.state.vectors, {})
        return origin_from(last.metadata["extra"], state, f"checkpoint {len(self._checkpoints)}")

    def _assemble(self, layout: Layout, remains: Remains, base: Origin) -> Origin:
        origin = assemble(layout, remains, base)
        saved = self.watch.salvage(remains)
        self.world.note(described(remains, base, "float32"))
        self._salvaged = (origin, saved)
        return origin

    def _session(self, *arguments: Any, **settings: Any) -> Session:
        origin: Origin = arguments[4]
        saved = self._checkpoints[-1].saved if self._checkpoints else None
        if self._salvaged is not None and origin is self._salvaged[0]:
            saved = self._salvaged[1]
        self.watch.begin_session(saved)
        self._read_states.clear()
        self.world.note(f"session {self.watch.session} from {origin.position}")
        session: Session = cast(Any, Session)(*arguments, clock=self.world.clock, **settings)
        return session

    def _write_checkpoint(
        self, folder: Path, state: ModelState, layout: object, extra: dict[str, Any]
    ) -> Path:
        position = Position.from_json(extra["position"])
        states = [self._read_states[address] for address in self.watch.shards]
        saved = self.watch.save(position, states, extra["totals"]["samples_twice"])
        metadata = {"updates": state.clocks.updates, "extra": json.loads(json.dumps(extra))}
        self.world.note(f"checkpoint at {state.clocks.updates}, {position}")
        self._checkpoints.append(_Checkpoint(state, metadata, saved))
        return Path(f"checkpoint-{len(self._checkpoints)}")

    def _client(self, *arguments: Any, **settings: Any) -> WatchedClient:
        settings |= {"clock": self.world.clock, "sleep": self.world.sleep}
        client: WatchedClient = cast(Any, WatchedClient)(*arguments, **settings)
        client.watch, client.read_states = self.watch, self._read_states
        return client

    def _plain(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        """Of a client whose answers nobody checks."""
        return partial(kind, clock=self.world.clock, sleep=self.world.sleep)

    def _actor(self, kind: str, make: Callable[..., Any], quick: tuple[str, ...]) -> ActorClass:
        return ActorClass(self.ray, kind, make, quick)

    def _life(self) -> Any:
        return self.world.party.belongings["life"]

    def _seams_of_servers(self, time: SimpleNamespace) -> dict[str, Any]:
        """Around servers, and what looks after them."""
        watch, wires = self.watch, self.wires
        servers = self._actor(
            "server",
            lambda p, *a: SimulatedServer(p, watch, wires, *a),
            ("begin", "stop"),
        )
        return {
            "asynception.servers.ray": self.ray,
            "asynception.servers.ServerActor": servers,
            "asynception.keeper.ray": self.ray,
            "asynception.keeper.time": time,
            "asynception.failover.ThreadPoolExecutor": Executor,
            "asynception.failover.ray": self.ray,
            "asynception.keeper.ShardClient": self._plain(ShardClient),
            "asynception.keeper.ReplicationClient": self._plain(ReplicationClient),
        }

    @contextmanager
    def _seams(self) -> Iterator[None]:
        """Put the simulated surroundings in the place of the real ones, for the block."""
        watch, world, wires, scenario = self.watch, self.world, self.wires, self.scenario
        time = SimpleNamespace(monotonic=world.clock)
        num_shards = scenario.config.scaling.num_servers
        coordinators = ActorClass(
            self.ray,
            "coordinator",
            lambda p, *a: WatchedCoordinator(p, watch, world, *a),
            COORDINATOR_CALLS,
            returns=True,
        )
        workers = self._actor("worker", lambda p, *a: SimulatedWorker(p, watch, *a), ())
        replaced: dict[str, Any] = {
            "grpc.insecure_channel": wires.channel,
            "ps.lanes.stream.CHUNK_NUM_BYTES": CHUNK_NUM_BYTES,
            "ps.client.ShardClient": self._client,
            "ps.client.ThreadPoolExecutor": Executor,
            "worker.exchange.Chain": Chain,
            "worker.exchange.BEAT_S": BEAT_S,
            "asynception.actors.ray": self.ray,
            "asynception.actors.time": time,
            "asynception.actors.LEASE_TIMEOUT_S": LEASE_TIMEOUT_S,
            "asynception.actors.tune_malloc": lambda: None,
            "asynception.actors.build_flat": lambda *_: Vectors(num_shards),
            "asynception.actors.build_objective": lambda *_: None,
            "asynception.actors.GradientComputer": lambda flat, *_: Computer(scenario, world, flat),
            "asynception.actors.open_train": lambda _: None,
            "asynception.actors.train_loader": lambda *_: Loader(scenario, self._life()),
            "asynception.salvage.ray": self.ray,
            "asynception.salvage.ShardClient": self._client,
            "asynception.salvage.ThreadPoolExecutor": Executor,
            "asynception.salvage.time": SimpleNamespace(monotonic=world.clock, sleep=world.sleep),
            "asynception.trainer.assemble": self._assemble,
            "asynception.saver.ray": self.ray,
            "asynception.saver.ThreadPoolExecutor": Executor,
            "asynception.saver.write_checkpoint": self._write_checkpoint,
            "asynception.saver.prune_checkpoints": lambda *_: None,
            "asynception.places.ray": self.ray,
            "asynception.places.time": time,
            "asynception.supervisor.ray": self.ray,
            "asynception.supervisor.WorkerActor": workers,
            "asynception.session.ray": self.ray,
            "asynception.session.Journal": MemoryJournal,
            "asynception.session.identities": lambda _: None,
            "asynception.session.CoordinatorActor": coordinators,
            "asynception.session.EvaluatorActor": self._actor("evaluator", SimulatedEvaluator, ()),
            "asynception.session.read_metadata": lambda _: self._checkpoints[-1].metadata,
            "asynception.trainer.Session": self._session,
            **self._seams_of_servers(time),
        }
        with ExitStack() as stack:
            for name, value in replaced.items():
                stack.enter_context(mock.patch(name, value))
            yield


def simulate(
    seed: int,
    mode: str | None = None,
    *,
    harsh: bool = False,
    nodes: bool = False,
    replicas: int = 0,
    elastic: bool = False,
    notices: bool = False,
    losses: bool = False,
) -> Report:
    """Run a seed; see `draw` and `Simulation`. Raises SeedFailed."""
    more = {"nodes": nodes, "elastic": elastic, "notices": notices, "losses": losses}
    scenario = draw(seed, mode, replicas=replicas, **more)
    return Simulation(scenario, harsh=harsh).run()
