"""Which workers have a process, and which wait for a node with room for them."""

from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from asynception import places as places_module
from asynception.places import Places

LIMIT_S = 30.0
"""Within so long a worker that has a node begins."""


class Cluster:
    """Nodes of the workers' places, arrivals that are ready when told, and a clock to turn."""

    def __init__(self):
        self.now_s, self.nodes, self.ready, self.dead = (
            100.0,
            {0: "a", 1: "a", 2: "b"},
            set(),
            set(),
        )

    def worker_nodes(self):
        return self.nodes

    def wait(self, arrivals, timeout):
        return [each for each in arrivals if each in self.ready | self.dead], []

    def get(self, arrival):
        if arrival in self.dead:
            raise ActorDiedError


@pytest.fixture
def cluster(monkeypatch):
    cluster = Cluster()
    monkeypatch.setattr(places_module, "ray", cluster)
    clock = SimpleNamespace(monotonic=lambda: cluster.now_s)
    monkeypatch.setattr(places_module, "time", clock)
    return cluster


@pytest.fixture
def places(cluster):
    """Of three workers that have been started."""
    places = Places(cluster)
    for worker in range(3):
        places.begin(worker, f"arrival {worker}")
    return places


def arrive(cluster, places, *workers):
    cluster.ready |= {f"arrival {worker}" for worker in workers}
    return list(places.newly_arrived())


def test_who_lacks_room_is_told_once_and_so_is_their_return(cluster, places):
    assert places.newly_lacking({}, LIMIT_S) == []
    cluster.nodes = {0: "a", 1: "", 2: ""}
    assert places.newly_lacking({}, LIMIT_S) == [1, 2]
    assert places.newly_lacking({}, LIMIT_S) == []
    assert (places.lacking, places.absent) == ({1, 2}, {0, 1, 2})
    assert arrive(cluster, places, 0) == [], "it never lacked room"
    assert arrive(cluster, places, 1) == [1]
    assert arrive(cluster, places, 1) == []
    assert (places.lacking, places.absent) == ({2}, {2})


def test_an_actor_that_died_before_it_began_is_not_back(cluster, places):
    cluster.nodes = {0: "", 1: "a", 2: "b"}
    assert places.newly_lacking({}, LIMIT_S) == [0]
    cluster.dead = {"arrival 0"}
    assert list(places.newly_arrived()) == []
    assert places.lacking == {0}


def test_a_node_that_does_not_start_its_worker_in_time_has_no_room_for_it(cluster, places):
    assert places.newly_lacking({0: LIMIT_S - 1, 1: LIMIT_S + 1}, LIMIT_S) == [1]
    assert places.has_node(1), "and is slow, or cut off"
    cluster.nodes = {0: "", 1: "a", 2: "b"}
    assert places.newly_lacking({}, LIMIT_S) == [0]
    assert not places.has_node(0)


def test_a_worker_is_silent_only_while_it_is_there(cluster, places):
    assert places.silence_s(0, 500.0) == 0.0, "it has no process yet"
    arrive(cluster, places, 0)
    cluster.now_s += 7
    assert places.silence_s(0, 500.0) == 7.0, "it was not there before"
    assert places.silence_s(0, 3.0) == 3.0


def test_a_place_is_known_to_have_moved(cluster, places):
    assert not places.lost_its_node(0), "nobody has asked where it is"
    places.newly_lacking({}, LIMIT_S)
    assert not places.lost_its_node(0)
    cluster.nodes = {0: "b", 1: "", 2: "b"}
    assert [places.lost_its_node(worker) for worker in range(3)] == [True, True, False]


def test_the_time_without_room_counts_from_the_last_one_that_lost_it(cluster, places):
    assert places.lacking_s() == 0.0
    cluster.nodes = {0: "", 1: "a", 2: "b"}
    places.newly_lacking({}, LIMIT_S)
    cluster.now_s += 5
    cluster.nodes = {0: "", 1: "", 2: "b"}
    places.newly_lacking({}, LIMIT_S)
    cluster.now_s += 2
    assert places.lacking_s() == 2.0
