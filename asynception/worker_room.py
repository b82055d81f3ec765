"""Room for workers: reserved together with all else, or, if their number may change, one by one."""

from collections.abc import Collection
from typing import Protocol

from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from asynception.shortage import Resources


class WorkerRoom(Protocol):
    """The places in which workers are wanted, and where they are."""

    comes_and_goes: bool
    """Whether a place has room, or lacks it, by itself, so that a worker begins when it has."""
    wanted: Collection[int]
    resources: Resources
    """What each worker needs."""

    def bundle(self, worker: int) -> tuple[PlacementGroup, int]:
        """What a worker's actors are to be placed in."""

    def nodes(self) -> dict[int, str]:
        """Ray's id of the node that each place is on; empty while there is none."""

    def want(self, workers: Collection[int]) -> None:
        """From now on, workers are wanted in these places. Ask Ray for the room of new ones."""

    def release(self, worker: int) -> None:
        """Give a place's room back, if that can be: it is not wanted, and nobody is in it."""

    def move(self, worker: int) -> None:
        """Seek room elsewhere, if that can be, for a place whose node will be gone."""


class SharedRoom:
    """The last bundles of a group of the run's: held from the run's start to its end.

    When a node dies, Ray seeks room on the others for what was on it.
    """

    comes_and_goes = False

    def __init__(self, group: PlacementGroup, num_workers: int, resources: Resources) -> None:
        """resources: of each worker."""
        self._group, self._num_workers, self.resources = group, num_workers, resources
        self._first = group.bundle_count - num_workers
        self.wanted: Collection[int] = range(num_workers)

    def bundle(self, worker: int) -> tuple[PlacementGroup, int]:
        return self._group, self._first + worker

    def nodes(self) -> dict[int, str]:
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        return {worker: nodes.get(self._first + worker, "") for worker in range(self._num_workers)}

    def want(self, workers: Collection[int]) -> None:
        self.wanted = workers

    def release(self, worker: int) -> None:
        """It stays reserved: a group can't be given back in part."""

    def move(self, worker: int) -> None:
        """Ray does that once the node is gone."""


class OwnRoom:
    """A placement group for each worker. Those that are pending are what an autoscaler sees.

    Ray places new groups on no node that is being drained.
    """

    comes_and_goes = True

    def __init__(self, resources: Resources, least: int) -> None:
        """resources: of each worker. least: workers without which the run doesn't begin."""
        self.resources, self._least = resources, least
        self._groups: dict[int, PlacementGroup] = {}
        self.wanted: Collection[int] = ()

    def bundle(self, worker: int) -> tuple[PlacementGroup, int]:
        return self._groups[worker], 0

    def nodes(self) -> dict[int, str]:
        known = placement_group_table()
        tables = {w: known.get(group.id.hex()) for w, group in self._groups.items()}
        return {w: table["bundles_to_node_id"][0] if table else "" for w, table in tables.items()}

    @property
    def num_lacking(self) -> int:
        """Workers for which there is no room yet, of the least number."""
        return max(0, self._least - sum(map(bool, self.nodes().values())))

    def want(self, workers: Collection[int]) -> None:
        self.wanted = workers
        for worker in sorted(workers):
            if worker not in self._groups:
                self._groups[worker] = placement_group([dict(self.resources)])

    def release(self, worker: int) -> None:
        remove_placement_group(self._groups.pop(worker))

    def move(self, worker: int) -> None:
        self.release(worker)
        self._groups[worker] = placement_group([dict(self.resources)])

    def close(self) -> None:
        """Give all room back."""
        for worker in list(self._groups):
            self.release(worker)
