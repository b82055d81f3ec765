"""What a recipe may ask of replicas, and where standbys are put."""

import re
from types import SimpleNamespace

import pytest

from asynception import cluster, servers
from asynception.cluster import Room
from asynception.recipe import validate
from asynception.servers import Server, Servers
from asynception.spots import NoRoom
from model.errors import InputError


def config_of(**sections):
    data, training = {"train": "/a", "val": "/b"}, {"epochs": 1}
    return validate({"data": data, "training": training, **sections})


@pytest.mark.parametrize(
    ("consistency", "said"),
    [
        ({"mode": "allreduce"}, 'consistency.mode = "allreduce"'),
        ({"mode": "async", "delay_compensation": 0.5}, "consistency.delay_compensation = 0.5"),
    ],
)
def test_what_a_standby_could_not_follow_is_refused(consistency, said):
    assert config_of(consistency=consistency).scaling.replicas == 0
    with pytest.raises(InputError, match=re.escape(said)):
        config_of(consistency=consistency, scaling={"replicas": 1})


@pytest.mark.parametrize("replicas", [-1, 2])
def test_there_is_one_standby_or_none(replicas):
    with pytest.raises(InputError, match=r"scaling\.replicas"):
        config_of(scaling={"replicas": replicas})


def node(name, memory=10.0, alive=True):
    return {"NodeID": name * 28, "Alive": alive, "Resources": {"memory": memory, "CPU": 4.0}}


@pytest.fixture(autouse=True)
def _nobody_has_to_leave(monkeypatch):
    monkeypatch.setattr(cluster, "draining_nodes", tuple)


@pytest.fixture(autouse=True)
def no_room_now(monkeypatch):
    monkeypatch.setattr(cluster, "free_resources", dict)


def spot_for(monkeypatch, nodes, away_from, crowded=()):
    monkeypatch.setattr(cluster, "ray", SimpleNamespace(nodes=lambda: nodes))
    room = Room((), [{"memory": 5.0, "CPU": 1.0}], 1, None, {}, None)
    names = {name * 28: count for name, count in crowded}
    spot = room.for_standby(0, away_from * 28, names)
    return spot.options["scheduling_strategy"].node_id, spot


def test_a_standby_is_on_the_emptiest_other_node_that_is_large_enough(monkeypatch):
    nodes = [node("aa"), node("bb", memory=1.0), node("cc"), node("dd"), node("ee", alive=False)]
    chosen, spot = spot_for(monkeypatch, nodes, "aa", [("aa", 0), ("cc", 2), ("dd", 1)])
    assert (chosen, spot.is_apart) == ("dd" * 28, True)
    assert (spot.options["memory"], spot.options["num_cpus"]) == (5.0, 1.0)


@pytest.mark.parametrize("others", [[], [node("bb", memory=1.0)], [node("bb", alive=False)]])
def test_with_no_other_node_it_is_beside_its_server_and_says_so(monkeypatch, others):
    chosen, spot = spot_for(monkeypatch, [node("aa"), *others], "aa")
    assert (chosen, spot.is_apart) == ("aa" * 28, False)


def test_a_node_that_has_room_now_goes_before_emptier_ones_that_have_not(monkeypatch):
    nodes = [node(name) for name in ("aa", "bb", "cc")]
    free = {"cc" * 28: {"memory": 9.0, "CPU": 4.0}}
    monkeypatch.setattr(cluster, "free_resources", lambda: free)
    assert spot_for(monkeypatch, nodes, "aa", [("cc", 5)])[0] == "cc" * 28
    assert spot_for(monkeypatch, nodes, "cc", [("bb", 5)])[0] == "aa" * 28, "its own is no use"


def test_a_place_of_the_run_s_that_its_server_has_left_is_taken_first(monkeypatch):
    monkeypatch.setattr(cluster.Room, "_nodes", lambda _: {0: "bb" * 28})
    monkeypatch.setattr(cluster.Room, "_place", lambda _, bundle: SimpleNamespace(node_id=bundle))
    nodes = [node("aa"), node("bb"), node("cc")]
    chosen, spot = spot_for(monkeypatch, nodes, "aa", [("bb", 5)])
    assert (chosen, spot.node, spot.is_apart) == (0, "bb" * 28, True)
    assert spot_for(monkeypatch, nodes, "bb")[0] == "aa" * 28, "its server is still there"
    assert spot_for(monkeypatch, [nodes[0], node("bb", alive=False)], "aa")[0] == "aa" * 28
    monkeypatch.setattr(cluster, "draining_nodes", lambda: {"bb" * 28})
    assert spot_for(monkeypatch, nodes, "aa")[0] == "cc" * 28


def test_a_node_that_will_soon_be_gone_is_none(monkeypatch):
    monkeypatch.setattr(cluster, "draining_nodes", lambda: {"bb" * 28})
    chosen, _ = spot_for(monkeypatch, [node("aa"), node("bb"), node("cc")], "aa", [("cc", 5)])
    assert chosen == "cc" * 28
    chosen, spot = spot_for(monkeypatch, [node("aa"), node("bb")], "aa")
    assert (chosen, spot.is_apart) == ("aa" * 28, False)


def test_who_has_to_leave_seeks_a_node_that_has_room_now(monkeypatch):
    monkeypatch.setattr(cluster, "draining_nodes", lambda: {"aa" * 28, "bb" * 28})
    free = {name * 28: {"memory": 9.0, "CPU": 4.0} for name in ("aa", "bb", "cc", "dd")}
    free["cc" * 28]["CPU"] = 0.5
    monkeypatch.setattr(cluster, "free_resources", lambda: free)
    nodes = [node(name) for name in ("aa", "bb", "cc", "dd")]
    chosen, spot = spot_for(monkeypatch, nodes, "aa", [("dd", 5)])
    assert (chosen, spot.is_apart) == ("dd" * 28, True)
    free["dd" * 28]["memory"] = 1.0
    with pytest.raises(NoRoom, match="no other node that stays has 1 CPU free"):
        spot_for(monkeypatch, nodes, "aa")


def test_standbys_of_several_servers_are_spread(monkeypatch):
    room = Room((), [{"memory": 5.0}] * 2, 2, None, {}, None)
    nodes = [node("aa"), node("bb"), node("cc")]
    monkeypatch.setattr(cluster, "ray", SimpleNamespace(nodes=lambda: nodes))
    made = Servers(SimpleNamespace(), room, "token", None)
    made.primaries = [Server(None, f"a:{n}", "aa" * 28, object()) for n in (1, 2)]
    chosen = []
    monkeypatch.setattr(made, "_create", lambda shard, options: chosen.append(options) or Actor())
    monkeypatch.setattr(
        servers,
        "ray",
        SimpleNamespace(
            wait=lambda calls, timeout: (calls[:1], calls[1:]),
            get=lambda *_, **__: ("b:1", "bb" * 28),
        ),
    )
    for shard in (0, 1):
        made.start_standby(shard)
    assert {each["scheduling_strategy"].node_id for each in chosen} == {"bb" * 28, "cc" * 28}


class Actor:
    """Every method of which can be called."""

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda: None)
