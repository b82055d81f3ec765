"""Which places of a run are to have a worker, which of them wait for room, and who is to leave."""

from collections.abc import Callable, Mapping
from typing import Any

from asynception.cluster import Room
from asynception.config import TrainConfig
from asynception.config_scaling import spelled
from asynception.headcount import check_count, places_for
from asynception.places import Places
from asynception.shortage import named


class Staff:
    """Places that are vacant, and workers that were told to leave.

    Where places come and go, each is filled as soon as it has room. Otherwise the supervisor fills
    them in turn, and again after a death; vacant are then those from which a worker left.
    """

    def __init__(
        self,
        config: TrainConfig,
        room: Room,
        places: Places,
        actors: Mapping[int, Any],
        tell: Callable[[str], None],
    ) -> None:
        """actors: of the workers that are started, by place, as of whenever it is looked at."""
        self._config, self._room, self._places = config, room, places
        self._actors, self._tell = actors, tell
        self._vacant: set[int] = set()
        self._leaving: set[int] = set()
        self._told_of_too_few = False
        self.num_opened = 0
        """The first so many places have had their first worker, or are to be vacant until then."""

    @property
    def staying(self) -> list[int]:
        """Workers that are started and were not told to leave."""
        return [worker for worker in self._actors if worker not in self._leaving]

    @property
    def num_sharing(self) -> int:
        """Workers that share the run's samples; where these come and go, as of now."""
        scaling = self._config.scaling
        return max(1, len(self.staying)) if scaling.is_range else scaling.max_workers

    @property
    def described(self) -> str:
        """How many workers there are of how many that are wanted."""
        at_work = sum(worker not in self._places.lacking for worker in self.staying)
        return f"{at_work} of {len(self._room.workers.wanted)} workers"

    @property
    def is_complete(self) -> bool:
        """Whether all workers that are wanted are there, and no others."""
        return set(self._actors) - self._places.lacking == set(self._room.workers.wanted)

    @property
    def pending(self) -> str:
        """How many workers there are, and what is waited for."""
        told, nodes = [self.described], self._room.worker_nodes()
        if self._leaving:
            told.append(f"{len(self._leaving)} more leave after their push")
        num_without = sum(not nodes.get(worker) for worker in self._room.workers.wanted)
        if num_without:
            needs = named(self._room.worker_resources)
            told.append(f"{num_without} begin once there is room for them: each needs {needs}")
        return "; ".join(told)

    def open(self) -> bool:
        """Have all places filled as they get room; whether this is the first time."""
        is_first, self.num_opened = self.num_opened == 0, self._config.scaling.max_workers
        self._vacate()
        return is_first

    def _vacate(self) -> None:
        self._vacant = {
            worker for worker in self._room.workers.wanted if worker not in self._actors
        }

    def num_vacant(self, due: int) -> int:
        """Vacant places that are to be filled now, if `due` workers are to be at work."""
        return max(0, min(len(self._vacant), due - len(self.staying)))

    def ready(self, num_vacant: int) -> list[int]:
        """So many vacant places at most that have room, which are then taken as filled.

        Those whose node will be gone seek room elsewhere.
        """
        nodes, draining = self._room.worker_nodes(), self._room.draining_nodes()
        for worker in self._vacant:
            if nodes.get(worker) in draining:
                self._room.workers.move(worker)
        usable = [w for w in self._vacant if nodes.get(w) and nodes[w] not in draining]
        found = sorted(usable)[:num_vacant]
        self._vacant.difference_update(found)
        return found

    def check_enough(self, lacks_room: bool) -> None:
        """Tell, once each time, when for lack of room fewer are at work than the least number."""
        scaling, staying = self._config.scaling, len(self.staying)
        too_few = scaling.is_range and lacks_room and staying < scaling.min_workers
        if too_few and not self._told_of_too_few:
            self._tell(
                f"{self.described}, fewer than scaling.num_workers = "
                f"{spelled(scaling.num_workers)} says: waiting for nodes with "
                f"{named(self._room.worker_resources)}, and those that there are go on"
            )
        self._told_of_too_few = too_few

    def scale(self, num_workers: int) -> None:
        """Want so many workers from now on: who is too many leaves after its push.

        Raises InputError.
        """
        check_count(self._config, num_workers)
        room = self._room.workers
        before = room.wanted
        room.want(places_for(num_workers, before, self.staying))
        self._tell(f"scaled from {len(before)} to {num_workers} workers")
        self.open()
        for worker in set(before).difference(room.wanted):
            if worker in self._actors:
                self._ask_to_leave(worker, f"the run was scaled to {num_workers} workers")
            else:
                room.release(worker)

    def heed_notices(self) -> None:
        """Have workers leave whose nodes will soon be gone. To be called often."""
        draining = self._room.draining_nodes()
        if not draining:
            return
        nodes = self._room.worker_nodes()
        for worker in self.staying:
            if nodes.get(worker) in draining:
                self._ask_to_leave(worker, "its node is being drained")

    def _ask_to_leave(self, worker: int, why: str) -> None:
        self._leaving.add(worker)
        self._actors[worker].leave.remote(why)

    def gone(self, worker: int, left: bool) -> bool:
        """A worker has ended. Whether its place is to have another at once, if there is work.

        left: before its work was done, which others that had nothing to do may take over.
        """
        self._leaving.discard(worker)
        room = self._room.workers
        is_wanted = worker in room.wanted
        if not is_wanted:
            room.release(worker)
        if is_wanted and not left and not room.comes_and_goes:
            return True
        opened = {each for each in room.wanted if each < self.num_opened}
        self._vacant |= opened.difference(self._actors)
        return False
