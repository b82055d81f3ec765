"""Deaths, freezes and partitions at the times that a scenario says."""

from collections.abc import Sequence

from asynception.orders import Order, Orders
from asynception.simulate.cluster import Handle, SimulatedRay
from asynception.simulate.hosts import Hosts
from asynception.simulate.network import Network
from asynception.simulate.scenario import Fault
from asynception.simulate.world import Party, World


class Chaos:
    """Does to the parties what is due, if there is one to do it to."""

    def __init__(
        self,
        world: World,
        network: Network,
        ray: SimulatedRay,
        hosts: Hosts,
        faults: Sequence[Fault],
        orders: Orders,
        max_workers: int,
    ) -> None:
        self._world, self._network, self._ray = world, network, ray
        self._hosts, self._orders, self._max_workers = hosts, orders, max_workers
        self._faults = faults
        self._party = Party("chaos")

    def begin(self) -> None:
        """From now on."""
        for fault in self._faults:
            self._world.call_at(fault.at_s, self._party, lambda fault=fault: self._do(fault))  # type: ignore[misc]

    def _do(self, fault: Fault) -> None:
        if fault.kind == "node":
            self._lose_nodes(fault)
            return
        if fault.kind in ("drain", "scale"):
            self._change(fault)
            return
        if fault.kind == "notice":
            self._hosts.drain(fault.choice, fault.seconds)
            return
        if fault.kind == "host":
            self._hosts.add()
            return
        kind = {"zombie": "worker", "sigterm": "worker", "cut": "", "frozen": ""}.get(
            fault.kind, fault.kind
        )
        kind = kind.rpartition(" ")[2]
        handles = [h for h in self._ray.handles if h.party.alive and not h.believed_dead]
        handles = [h for h in handles if h.party.name.startswith(kind)]
        if not handles:
            return
        handle = handles[int(fault.choice * len(handles))]
        match fault.kind.partition(" ")[0]:
            case "zombie":
                self._ray.declare_dead(handle, fault.seconds)
            case "sigterm":
                self._world.note(f"{handle.party.name} gets SIGTERM")
                handle.instance.leave("it got SIGTERM")
            case "cut":
                self._network.cut_off([handle.party.name], fault.seconds)
            case "frozen":
                self._freeze(handle, fault.seconds)
            case _:
                self._world.kill(handle.party)

    def _change(self, fault: Fault) -> None:
        """Drain the node of a place, or order another number of workers."""
        number = int(fault.choice * self._max_workers)
        if fault.kind == "scale":
            self._world.note(f"{number + 1} workers are ordered")
            self._orders.give(Order(num_workers=number + 1))
        else:
            self._world.note(f"the node in place {number} is drained")
            self._ray.draining = {*self._ray.draining, self._ray.node_of(number)}

    def _lose_nodes(self, fault: Fault) -> None:
        """A share of the workers dies, and for a while there is no room for any."""
        self._ray.room_again_s = self._world.now_s + fault.seconds
        workers = self._ray.alive("worker")
        dying = workers[: round(fault.choice * len(workers))]
        self._world.note(f"{len(dying)} workers lose their node, no room for {fault.seconds} s")
        for handle in dying:
            self._world.kill(handle.party)

    def _freeze(self, handle: Handle, seconds: float) -> None:
        self._world.note(f"{handle.party.name} is stopped for {seconds:.1f} s")
        until_s = self._world.now_s + seconds
        handle.party.frozen_until_s = max(handle.party.frozen_until_s, until_s)
