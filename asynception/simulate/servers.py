"""The run's servers: real services, watched, behind the simulated gRPC; alone or in pairs."""

from typing import Any, cast

from asynception.actors import Replication
from asynception.simulate.channel import Endpoint, Wires
from asynception.simulate.cluster import NODE
from asynception.simulate.parties import Told, WatchedService
from asynception.simulate.scenario import SHARD_NUMEL
from asynception.simulate.shard_watch import ShardWatch
from asynception.simulate.waiting import Condition
from asynception.simulate.watch import Watch
from asynception.simulate.world import Party, Signal, World, current
from ps import server
from ps.lanes.gate import Gate
from ps.lanes.grpc import bytes_handlers
from ps.lanes.lane import LaneSettings
from ps.operations import Operation, has_effect
from ps.push import Order
from ps.replicated import ReplicatedService
from ps.replication import StandbyLink, add_replication
from ps.server import _ControlServicer, _TokenInterceptor
from ps.shard import Shard, ShardConfig
from ps.standby import Echo

CHECK_EVERY = 3
"""Updates between checksums."""


class WatchedPair(WatchedService, ReplicatedService):
    """One of a shard's servers. Whichever carries an operation out first tells the watch."""

    def __init__(
        self,
        config: ShardConfig,
        watch: ShardWatch,
        run_watch: Watch,
        world: World,
        is_paired: bool,
    ) -> None:
        more = {"check_every": CHECK_EVERY, "is_paired": is_paired}
        super().__init__(config, watch, run_watch, world, **more)
        self._turns = cast(Any, Condition(self._lock))

    def _told(self, shard: Shard, index: int, operation: Operation) -> Told | None:
        if index < self._watch.num_operations or not has_effect(shard, operation):
            return None
        return Told(self._watch, self._run_watch, operation)

    def _done(self, shard: Shard, index: int, told: Told | None, result: Any) -> None:
        if told is not None:
            self._watch.num_operations = index + 1
            told.done(shard, result)
        newest = shard._snapshots.newest
        self._watch.check_version(newest.version, newest.parameters, newest.statistics)
        self._watch.check_same(newest.version, shard.checksum())

    def _perform(self, shard: Shard, operation: Operation, arrived_s: float) -> Any:
        index = self._num_performed
        told = self._told(shard, index, operation)
        result = ReplicatedService._perform(self, shard, operation, arrived_s)
        self._done(shard, index, told, result)
        return result

    def follow(self, order: Order, operation: Operation) -> Echo:
        standby = self._standby
        shard, before = standby._shard, standby._next_index
        told = None
        if shard is not None and order.index == before:
            told = self._told(shard, order.index, operation)
        echo = super().follow(order, operation)
        if shard is not None and standby._next_index > before:
            self._done(shard, order.index, told, self._result(shard, operation, echo))
        return echo

    def _result(self, shard: Shard, operation: Operation, echo: Echo) -> Any:
        """What the shard said, as far as the watch asks for it."""
        if echo.receipt is not None:
            return echo.receipt
        return shard.last_sequences().get(getattr(operation, "worker", -1), {})

    def promote(self, epoch: int) -> int:
        version = super().promote(epoch)
        current().note(f"{self._watch.address} is served by {current().party.name}, {version}")
        self._watch.check_newest(self._loaded()._snapshots.newest)
        return version


class SimulatedServer:
    """A shard behind the simulated gRPC."""

    def __init__(
        self,
        party: Party,
        watch: Watch,
        wires: Wires,
        config: ShardConfig,
        *arguments: Any,
    ) -> None:
        """arguments: as of `ServerProcess`."""
        self._party, self._address = party, f"{party.name}:1"
        replication: Replication = arguments[-1]
        of_shard = watch.add_server(self._address, config.ranges.parameters.start // SHARD_NUMEL)
        service = WatchedPair(config, of_shard, watch, wires.world, replication.is_paired)
        self._stopped = Signal(wires.world)
        endpoint = Endpoint(party)
        gate = cast(Gate, None)  # it opens other lanes
        servicer = _ControlServicer(service, gate, _TokenInterceptor("token"))
        generated = cast(Any, server).pb_grpc
        generated.add_ParameterServerServicer_to_server(servicer, endpoint)
        endpoint.add_generic_rpc_handlers((bytes_handlers(service),))
        self._replicate(endpoint, service, replication, wires.world)
        wires.listen(self._address, endpoint)

    def _replicate(
        self, endpoint: Endpoint, service: ReplicatedService, settings: Replication, world: World
    ) -> None:
        def connect(address: str) -> StandbyLink:
            return StandbyLink(
                address,
                "token",
                settings.retry,
                LaneSettings(choice="grpc"),
                clock=world.clock,
                sleep=world.sleep,
            )

        add_replication(cast(Any, endpoint), service, connect)

    def begin(self) -> tuple[str, str]:
        return self._address, self._party.belongings[NODE]

    def serve(self) -> None:
        self._stopped.wait()

    def stop(self) -> None:
        """It has been retired before, so that it answers nobody."""
        self._stopped.set()
