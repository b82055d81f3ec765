"""Nodes with the run's servers: Ray is told that one will soon be gone, it goes, others come."""

from collections.abc import Mapping
from typing import Any

from asynception.simulate.cluster import NODE, SimulatedRay
from asynception.simulate.world import Party, World
from asynception.spots import NoRoom, Spot, emptiest


class Hosts:
    """As many as a scenario says, at first. Each has room for any number of servers."""

    def __init__(self, world: World, ray: SimulatedRay, num_hosts: int) -> None:
        self._world, self._ray = world, ray
        self._party = Party("hosts")
        self._names: list[str] = []
        self._num_named = 0
        for _ in range(num_hosts):
            self.add()

    def add(self) -> None:
        """Another one appears."""
        self._names.append(f"host-{self._num_named}")
        self._num_named += 1

    def for_server(self, shard: int) -> dict[str, Any]:
        """See `Room.for_server`: a place is kept until its node is gone, as Ray's are."""
        if not self._names:
            self.add()
        return {NODE: self._names[shard % len(self._names)]}

    def for_standby(self, shard: int, away_from: str, crowded: Mapping[str, int]) -> Spot:
        """See `Room.for_standby`."""
        node = emptiest(self._names, away_from, crowded, self._ray.draining)
        if node is None:
            raise NoRoom("no other node that stays")
        return Spot({NODE: node}, node != away_from, node)

    def drain(self, choice: float, seconds: float) -> None:
        """One of them is to be gone after so long. choice: which, from 0 to 1."""
        staying = [name for name in self._names if name not in self._ray.draining]
        if not staying:
            return
        name = staying[int(choice * len(staying))]
        self._world.note(f"{name} is drained, and gone in {seconds:.1f} s")
        self._ray.draining = {*self._ray.draining, name}
        self._world.call_at(self._world.now_s + seconds, self._party, lambda: self._lose(name))

    def _lose(self, name: str) -> None:
        self._world.note(f"{name} is gone")
        self._names.remove(name)
        self._ray.draining = frozenset(self._ray.draining) - {name}
        for handle in self._ray.handles:
            if handle.party.belongings.get(NODE) == name:
                self._world.kill(handle.party)
