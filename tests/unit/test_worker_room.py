"""Room for workers one by one, with placement groups that are made up."""

import threading
from types import SimpleNamespace

import pytest

from asynception import reservation, worker_room
from asynception.failures import Stopped
from asynception.reservation import _pending, _placed
from asynception.shortage import Part
from asynception.worker_room import OwnRoom

WORKER = {"CPU": 2.0}


class Groups:
    """Ray's placement groups, in the order in which they are asked for."""

    def __init__(self) -> None:
        self.asked: list[SimpleNamespace] = []
        self.removed: list[int] = []
        self.nodes: dict[int, str] = {}
        """By number of a group."""

    def make(self, bundles):
        assert bundles == [WORKER]
        number = len(self.asked)
        identity = SimpleNamespace(hex=lambda: f"{number:04x}")
        self.asked.append(SimpleNamespace(id=identity, number=number))
        return self.asked[-1]

    def table(self):
        return {
            group.id.hex(): {"bundles_to_node_id": {0: self.nodes.get(group.number, "")}}
            for group in self.asked
        }

    def remove(self, group) -> None:
        self.removed.append(group.number)


@pytest.fixture
def groups(monkeypatch):
    groups = Groups()
    monkeypatch.setattr(worker_room, "placement_group", groups.make)
    monkeypatch.setattr(worker_room, "placement_group_table", groups.table)
    monkeypatch.setattr(worker_room, "remove_placement_group", groups.remove)
    return groups


def test_each_worker_has_a_group_that_is_placed_by_itself(groups):
    room = OwnRoom(WORKER, least=2)
    room.want(range(3))
    assert len(groups.asked) == 3, "all at once, so that an autoscaler sees them"
    assert room.nodes() == {0: "", 1: "", 2: ""}
    assert room.num_lacking == 2
    groups.nodes = {2: "a"}
    assert (room.nodes(), room.num_lacking) == ({0: "", 1: "", 2: "a"}, 1)
    groups.nodes[0] = "b"
    assert room.num_lacking == 0
    assert room.bundle(2) == (groups.asked[2], 0)


def test_room_is_given_back_when_it_is_not_in_use_any_more(groups):
    room = OwnRoom(WORKER, least=1)
    room.want(range(3))
    room.want({0})
    assert groups.removed == [], "somebody may still be there"
    room.release(2)
    assert groups.removed == [2]
    room.want({0, 2})
    assert len(groups.asked) == 4
    assert room.bundle(2)[0] is groups.asked[3]
    room.close()
    assert sorted(groups.removed) == [0, 1, 2, 3]


def test_a_place_moves_by_a_new_group(groups):
    room = OwnRoom(WORKER, least=1)
    room.want(range(2))
    groups.nodes = {0: "a", 1: "b"}
    room.move(1)
    assert groups.removed == [1]
    assert room.nodes() == {0: "a", 1: ""}


def test_a_run_waits_for_the_least_number_alone(groups, monkeypatch):
    monkeypatch.setattr(reservation, "ROOM_POLL_S", 0.001)
    room, stopping = OwnRoom(WORKER, least=2), threading.Event()
    room.want(range(4))
    groups.nodes = {1: "a"}
    assert not _placed([], room, 0.0, stopping)
    workers = [Part("worker", WORKER)] * 2
    assert _pending([], workers, room) == workers[:1]
    groups.nodes[3] = "a"
    assert _placed([], room, 0.0, stopping)
    assert _pending([], workers, room) == []
    del groups.nodes[3]
    stopping.set()
    with pytest.raises(Stopped):
        _placed([], room, 60.0, stopping)
