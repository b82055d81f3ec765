"""Which places get a worker, and who is told to leave, with room that is made up."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
from test_headcount import config

from asynception.staff import Staff


class Room:
    """As `asynception.cluster.Room`, with nodes that tests give and take."""

    def __init__(self, num_workers: int, comes_and_goes: bool) -> None:
        self.workers, self.worker_resources = self, {"CPU": 2.0}
        self.comes_and_goes, self.wanted = comes_and_goes, frozenset(range(num_workers))
        self.given: dict[int, str] = {}
        self.draining: set[str] = set()
        self.released: list[int] = []
        self.moved: list[int] = []

    def worker_nodes(self) -> dict[int, str]:
        return {worker: self.given.get(worker, "") for worker in self.wanted}

    def draining_nodes(self) -> set[str]:
        return self.draining

    def want(self, workers) -> None:
        self.wanted = frozenset(workers)

    def release(self, worker: int) -> None:
        self.released.append(worker)

    def move(self, worker: int) -> None:
        self.moved.append(worker)


class Actors(dict):
    """Workers at work, which note why they are told to leave."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[int, list[str]] = defaultdict(list)

    def begin(self, *workers: int) -> None:
        for worker in workers:
            leave = SimpleNamespace(remote=self.told[worker].append)
            self[worker] = SimpleNamespace(leave=leave)


class Setting:
    def __init__(self, num_workers) -> None:
        settings = config(num_workers)
        scaling = settings.scaling
        self.room, self.actors = Room(scaling.max_workers, scaling.is_range), Actors()
        self.said: list[str] = []
        self.places = SimpleNamespace(lacking=set())
        self.staff = Staff(settings, self.room, self.places, self.actors, self.said.append)

    def fill(self, due: int = 99) -> list[int]:
        """As the supervisor does."""
        ready = self.staff.ready(self.staff.num_vacant(due))
        self.actors.begin(*ready)
        return ready

    def end(self, worker: int, left: bool = True) -> bool:
        del self.actors[worker]
        return self.staff.gone(worker, left)


def test_of_a_range_each_worker_begins_when_there_is_room_for_it():
    setting = Setting([1, 4])
    assert setting.staff.open(), "the first time"
    assert setting.fill() == []
    setting.room.given = {2: "a", 3: "a"}
    assert setting.fill(due=1) == [2]
    assert setting.fill() == [3]
    assert setting.fill() == [], "each begins once"
    setting.room.given[0] = "b"
    assert not setting.staff.open()
    assert setting.fill() == [0]
    assert setting.staff.described == "3 of 4 workers"
    assert setting.staff.pending == (
        "3 of 4 workers; 1 begin once there is room for them: each needs 2 CPU"
    )


@pytest.mark.parametrize("left", [False, True])
def test_a_place_that_has_lost_its_node_is_filled_when_it_has_another(left):
    setting = Setting([1, 2])
    setting.staff.open()
    setting.room.given = {0: "a", 1: "b"}
    setting.fill()
    setting.room.given[1] = ""
    assert not setting.end(1, left), "not at once"
    setting.staff.open()
    assert setting.fill() == []
    setting.room.given[1] = "c"
    assert setting.fill() == [1]


def test_workers_leave_a_node_that_is_drained_and_seek_room_elsewhere():
    setting = Setting([1, 2])
    setting.staff.open()
    setting.room.given = {0: "a", 1: "b"}
    setting.fill()
    setting.room.draining = {"b"}
    for _ in range(3):
        setting.staff.heed_notices()
    assert setting.actors.told == {0: [], 1: ["its node is being drained"]}
    setting.end(1)
    setting.staff.open()
    assert setting.fill() == []
    assert setting.room.moved == [1]
    setting.room.given[1] = "c"
    assert setting.fill() == [1]
    setting.staff.heed_notices()
    assert len(setting.actors.told[1]) == 1


def test_of_a_fixed_number_the_dead_are_replaced_at_once_and_who_left_when_there_is_room():
    setting = Setting(3)
    setting.room.given = dict.fromkeys(range(3), "a")
    setting.staff.num_opened = 3
    setting.actors.begin(0, 1, 2)
    assert setting.end(0, left=False)
    setting.actors.begin(0)
    assert not setting.end(1)
    setting.room.draining = {"a"}
    assert setting.fill() == []
    setting.room.draining, setting.room.given[1] = set(), "b"
    assert setting.fill() == [1]
    assert setting.fill() == []


def test_whoever_has_nothing_to_do_takes_over_what_one_that_left_gives_back():
    setting = Setting(2)
    setting.room.given = {0: "a", 1: "a"}
    setting.staff.num_opened = 2
    setting.actors.begin(0, 1)
    setting.staff.scale(1)
    del setting.actors[0]  # it found no lease any more
    assert setting.staff.gone(0, left=False)
    assert not setting.end(1)
    assert setting.fill() == [0]


def test_a_run_is_scaled_down_by_who_leaves_and_up_by_who_begins():
    setting = Setting([1, 4])
    setting.staff.open()
    setting.room.given = {1: "a", 3: "b"}
    setting.fill()
    assert not setting.staff.is_complete
    setting.staff.scale(2)
    assert setting.room.released == [0, 2], "who waits for room, not who works"
    assert setting.staff.is_complete
    setting.staff.scale(1)
    assert setting.actors.told == {1: [], 3: ["the run was scaled to 1 workers"]}
    assert not setting.staff.is_complete, "as long as the other is there"
    assert setting.staff.pending == "1 of 1 workers; 1 more leave after their push"
    assert 3 not in setting.room.released, "its room is still in use"
    setting.end(3)
    assert setting.room.released[-1] == 3
    assert setting.staff.is_complete
    setting.staff.scale(3)
    setting.room.given = dict.fromkeys(range(4), "a")
    assert setting.fill() == [0, 2]
    assert setting.said == [f"scaled from {a} to {b} workers" for a, b in ((4, 2), (2, 1), (1, 3))]


def test_who_was_told_to_leave_and_is_wanted_again_begins_anew():
    setting = Setting([1, 2])
    setting.staff.open()
    setting.room.given = {0: "a", 1: "b"}
    setting.fill()
    setting.staff.scale(1)
    setting.staff.scale(2)
    assert setting.fill() == [], "it is still there"
    setting.end(1)
    setting.staff.open()
    assert setting.fill() == [1]
    assert setting.room.released == []


def test_fewer_than_the_least_number_are_told_of_once_each_time():
    setting = Setting([2, 3])
    setting.staff.open()
    setting.room.given = {0: "a"}
    setting.fill()
    for lacks_room in (True, True, False, True):
        setting.staff.check_enough(lacks_room)
    assert len(setting.said) == 2
    assert setting.said[0] == (
        "1 of 3 workers, fewer than scaling.num_workers = [2, 3] says: waiting for nodes with "
        "2 CPU, and those that there are go on"
    )
    setting.room.given[1] = "a"
    setting.fill()
    setting.staff.check_enough(lacks_room=True)
    assert len(setting.said) == 2
