"""What a shard's keeper does, step by step, when servers have to leave their nodes."""

from types import SimpleNamespace

import grpc
import pytest
from test_replicas_config import config_of

from asynception import failover as failovers
from asynception import keeper as keepers
from asynception.failover import Failover
from asynception.failures import SessionLost
from asynception.keeper import START_AGAIN_S, Keeper
from asynception.servers import Server
from asynception.spots import NoRoom
from ps.messages import ReplicaStatus
from ps.retry import ShardUnavailable

TIMEOUT_S = 20.0


class Refuses(grpc.RpcError):
    """A server says no."""


class World:
    """A shard's servers, of which the first is on the node "a"; what is done to them is kept."""

    def __init__(self, replicas):
        failure = {"server_timeout_s": TIMEOUT_S}
        self.config = config_of(scaling={"replicas": replicas}, failure=failure)
        self.now_s = 0.0
        self.did, self.told, self.ended, self.silent = [], [], set(), set()
        self.leaving, self.room = set(), ["b", "c", "d", "e"]
        self.fails = {}
        """By a call, like "promote b", what it raises."""
        self.primaries = [self.server("a")]

    def begin(self):
        plan = SimpleNamespace(config=self.config)
        connection = SimpleNamespace(token="token", identity=None)
        moved = [lambda shard, address, epoch: self.did.append(f"all follow {address}")]
        self.keeper = Keeper(
            0, plan, self, connection, moved, self.told.append, lambda: self.leaving
        )

    def server(self, node):
        stop = SimpleNamespace(remote=lambda: self.end(node, "stop"))
        return Server(SimpleNamespace(stop=stop, node=node), node, node, node)

    def end(self, node, how):
        self.did.append(f"{how} {node}")
        self.ended.add(node)

    def start_standby(self, shard):
        if not self.room:
            raise NoRoom("no other node that stays has room free")
        self.did.append(f"start {self.room[0]}")
        self.call("start", self.room[0])
        return self.server(self.room.pop(0)), True

    def call(self, name, node):
        error = self.fails.get(f"{name} {node}")
        if callable(error):
            error = error()
        if error is not None:
            raise error

    # In the place of Ray, of time, and of both clients.

    def wait(self, references, timeout):
        ready = [each for each in references if each in self.ended]
        return ready[:1], [each for each in references if each not in ready[:1]]

    def kill(self, actor):
        self.end(actor.node, "kill")

    def monotonic(self):
        return self.now_s

    def asker(self, address, *_, **__):
        def describe():
            if address in self.silent:
                raise ShardUnavailable
            return SimpleNamespace(replica=ReplicaStatus(1, "in_step"))

        return SimpleNamespace(describe=describe, close=lambda: None)

    def caller(self, address, *_, **__):
        def call(name, answer=None):
            def made(*arguments):
                self.did.append(" ".join([name, address, *map(str, arguments[:-1])]))
                self.call(name, address)
                return answer

            return made

        calls = {name: call(name) for name in ("attach", "detach", "retire")}
        return SimpleNamespace(promote=call("promote", 7), close=lambda: None, **calls)

    def look(self, after_s=0.0):
        self.now_s += after_s
        self.did.clear()
        self.keeper._look()
        return list(self.did)


@pytest.fixture
def world(monkeypatch):
    def make(replicas):
        made = World(replicas)
        monkeypatch.setattr(keepers, "ray", made)
        monkeypatch.setattr(keepers, "time", made)
        monkeypatch.setattr(keepers, "ReplicationClient", made.caller)
        monkeypatch.setattr(keepers, "ShardClient", made.asker)
        made.begin()
        return made

    return make


HANDED_OVER = ["promote b", "retire a", "all follow b", "stop a", "kill a"]


def test_without_replicas_a_standby_is_made_to_move_alone(world):
    it = world(0)
    assert it.look() == []
    it.leaving = {"a"}
    assert it.look() == ["start b", "attach a b", *HANDED_OVER]
    assert it.told == ["server 0 moved to another node at version 7: its node is being drained"]
    assert (it.keeper.num_moves, it.primaries[0].address) == (1, "b")
    assert it.look(100.0) == []
    it.leaving = {"a", "b"}
    assert it.look()[-1] == "kill b"
    assert it.keeper.num_moves == 2


def test_with_replicas_the_one_that_there_is_goes_on_and_gets_another(world):
    it = world(1)
    it.keeper.begin()
    assert it.look() == []
    it.leaving = {"a"}
    assert it.look() == HANDED_OVER
    assert it.look() == ["start c", "attach b c"]
    assert it.told[1:] == ["server 0 has a standby again"]


def test_a_standby_leaves_once_another_has_begun(world):
    it = world(1)
    it.keeper.begin()
    it.leaving = {"b"}
    assert it.look() == ["start c", "attach a c", "stop b", "kill b"]
    assert it.told == ["the standby of server 0 moved to another node: its node is being drained"]
    assert (it.look(), it.keeper.num_moves) == ([], 0)


def test_both_leave_one_after_the_other(world):
    it = world(1)
    it.keeper.begin()
    it.leaving = {"a", "b"}
    did = it.look()
    assert did[:4] == ["start c", "attach a c", "stop b", "kill b"]
    assert did[4:] == [each.replace(" b", " c") for each in HANDED_OVER]


def test_a_standby_that_is_to_leave_goes_on_if_its_server_dies_first(world):
    it = world(1)
    it.keeper.begin()
    it.leaving, it.fails = {"b"}, {"start c": lambda: it.ended.add("a")}
    assert it.look() == ["start c", "kill c"]
    assert it.look()[0] == "promote b"
    assert "its standby goes on at version 7" in it.told[-1]


@pytest.mark.parametrize("replicas", [0, 1])
def test_with_no_node_to_go_to_it_looks_again_now_and_then_and_says_so_once(world, replicas):
    it = world(replicas)
    it.leaving, it.room = {"a"}, []
    for _ in range(20):
        assert it.look(1.0) == []
    (told,) = it.told
    assert told.startswith("server 0 stays where it is, on a node that is being drained: no other")
    it.room = ["b"]
    looks = [it.look(1.0) for _ in range(int(START_AGAIN_S) + 1)]
    assert next(each for each in looks if each)[0] == "start b"
    assert it.keeper.num_moves == 1


@pytest.mark.parametrize("error", [ShardUnavailable(), Refuses()])
def test_a_server_goes_on_if_the_one_that_was_to_take_its_place_does_not(world, error):
    it = world(0)
    it.leaving = {"a"}

    def die():
        it.ended.add("b")
        return error

    it.fails = {"promote b": die}
    assert it.look()[2:] == ["promote b", "kill b", "detach a"]
    assert it.primaries[0].address == "a"
    assert it.look() == ["start c", "attach a c", *(s.replace(" b", " c") for s in HANDED_OVER)]
    assert it.keeper.num_moves == 1


def test_it_is_lost_if_it_had_heard_that_it_was_succeeded(world):
    it = world(0)
    it.leaving = {"a"}

    def die():
        it.ended.add("b")
        it.silent.add("a")
        return ShardUnavailable()

    it.fails = {"promote b": die}
    it.look()
    assert it.look(TIMEOUT_S - 1.0) == []
    with pytest.raises(SessionLost, match="server 0 gave no answer for"):
        it.look(2.0)


def test_who_is_only_silent_is_not_lost(world):
    it = world(0)
    it.silent, it.leaving = {"a"}, {"a"}
    assert it.look(10 * TIMEOUT_S) == []


def failover_of(told, leaving, **consistency):
    config = config_of(consistency=consistency)
    primaries = [Server(None, f"s{n}:1", f"node-{n}", f"serving {n}") for n in range(2)]
    servers = SimpleNamespace(
        primaries=primaries,
        serving=[server.serving for server in primaries],
        leaving=lambda: leaving,
    )
    return Failover(SimpleNamespace(config=config), servers, None, (), told.append)


@pytest.mark.parametrize(
    "consistency",
    [{"mode": "allreduce"}, {"mode": "async", "delay_compensation": 0.5}],
    ids=lambda given: given["mode"],
)
def test_where_servers_can_not_move_a_notice_is_told_of_once(consistency):
    told = []
    failover = failover_of(told, {"node-1"}, **consistency)
    for _ in range(3):
        failover.check()
    (line,) = told
    assert line.startswith("the node of server 1 is being drained, and with consistency.")
    assert failover.watched == ["serving 0", "serving 1"]
    assert not failover.may_have_moved


def test_without_a_notice_nobody_looks_after_servers_without_replicas():
    told = []
    failover = failover_of(told, {"node-7"}, mode="async")
    failover.check()
    assert (told, failover.num_moves, failover.may_have_moved) == ([], 0, False)
    assert failover.watched == ["serving 0", "serving 1"]


def test_a_server_that_has_ended_is_lost_unless_another_may_have_its_place(monkeypatch):
    ended = {"serving 1"}
    wait = SimpleNamespace(wait=lambda calls, timeout: ([c for c in calls if c in ended], []))
    monkeypatch.setattr(failovers, "ray", wait)
    failover = failover_of([], set(), mode="async")
    assert [failover.is_lost(shard) for shard in (0, 1)] == [False, True]
    failover._keepers[1] = None
    assert not failover.is_lost(1)
