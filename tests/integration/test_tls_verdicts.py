"""Whom gRPC takes for a server or a caller, the tcp lane takes, and nobody else.

But for two kinds of certificate, whose owners are left with gRPC: those that have a name as their
common name alone, or an address as a name.
"""

import contextlib
from dataclasses import replace

import pytest
from certificates import BOTH_USES, issue
from lane_cluster import HASTY, HOST, TOKEN, config_of, layout_of
from waiting import DEADLINE_S

from protos import parameter_server_pb2 as pb
from ps.client import ParameterClient, ShardUnavailable
from ps.lanes.lane import LaneError, Refused
from ps.lanes.tcp import TcpLane
from ps.lanes.tls_wire import TlsWire
from ps.server import ShardServer
from ps.service import ShardService

LAYOUT = layout_of()
FOR_SERVERS, FOR_CALLERS = BOTH_USES

ROOT = issue("root", authority=True)
BETWEEN = issue("between", ROOT, authority=True)
GOOD = {"hosts": [HOST]}


def one_side():
    """What one side shows, and the authorities that the other trusts, by what is odd about it."""
    self_signed, strange = issue("self", **GOOD), issue("root", authority=True)
    return {
        "nothing": (issue("a", ROOT, **GOOD), [ROOT], ()),
        "it is out of date": (issue("a", ROOT, **GOOD, days=(-3, -1)), [ROOT], ()),
        "it is not yet good": (issue("a", ROOT, **GOOD, days=(1, 3)), [ROOT], ()),
        "it is for servers": (issue("a", ROOT, **GOOD, uses=[FOR_SERVERS]), [ROOT], ()),
        "it is for callers": (issue("a", ROOT, **GOOD, uses=[FOR_CALLERS]), [ROOT], ()),
        "its authority has another key": (issue("a", strange, **GOOD), [ROOT], ()),
        "it is nobody's": (self_signed, [ROOT], ()),
        "it is trusted itself": (self_signed, [self_signed], ()),
        "its chain is shown": (issue("a", BETWEEN, **GOOD), [ROOT], [BETWEEN]),
        "its chain is not shown": (issue("a", BETWEEN, **GOOD), [ROOT], ()),
        "the middle of its chain is trusted": (issue("a", BETWEEN, **GOOD), [BETWEEN], ()),
        "it was issued by one that is no authority": (
            issue("a", issue("b", ROOT, **GOOD), **GOOD),
            [ROOT],
            [issue("b", ROOT, **GOOD)],
        ),
    }


SIDES = one_side()
TAKEN = {
    "server": {"nothing", "it is for servers", "its chain is shown"},
    "caller": {"nothing", "it is for callers", "its chain is shown"},
}
NAMED = {
    "another address": {"hosts": ["127.0.0.9"]},
    "a name alone": {"names": ["localhost"]},
    "its address as a name": {"names": [HOST]},
    "several addresses": {"hosts": ["127.0.0.9", HOST]},
    "no name at all": {},
}


@contextlib.contextmanager
def serving(identity):
    server = ShardServer(ShardService(config_of(LAYOUT.shards[0])), HOST, TOKEN, 4, None, identity)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def grpc_takes(server, caller):
    client = ParameterClient([server.address], LAYOUT, TOKEN, HASTY, identity=caller)
    try:
        client.shards[0].expect([], 0)
    except ShardUnavailable:
        return False
    except Refused:
        return True  # by a shard that has no state yet
    finally:
        client.close()
    return True


def tcp_takes(server, caller):
    context, name = caller.caller_context(), caller.name or HOST
    lane = TcpLane(
        HOST,
        lambda _: pb.OpenLaneReply(
            ticket=server._gate._tickets.issue(), tcp_port=server._gate._offer.tcp_port
        ),
        lambda connection: TlsWire(connection, context, name),
    )
    try:
        lane.open(DEADLINE_S)
    except LaneError:
        return False
    finally:
        lane.close()
    return True


def verdicts(server_identity, caller_identity):
    with serving(server_identity) as server:
        return grpc_takes(server, caller_identity), tcp_takes(server, caller_identity)


def good(authorities=(ROOT,)):
    return issue("good", ROOT, **GOOD).identity(authorities)


@pytest.mark.parametrize("odd", SIDES)
@pytest.mark.parametrize("side", ["server", "caller"])
def test_lanes_agree_on_who_belongs(side, odd):
    shown, trusted, chain = SIDES[odd]
    odd_one, other = shown.identity([ROOT], chain), good(trusted)
    pair = (odd_one, other) if side == "server" else (other, odd_one)
    by_grpc, by_tcp = verdicts(*pair)
    assert by_tcp == by_grpc
    if "trusted" not in odd:
        assert by_tcp == (odd in TAKEN[side])


@pytest.mark.parametrize("odd", NAMED)
def test_lanes_agree_on_addresses(odd):
    by_grpc, by_tcp = verdicts(issue(HOST, ROOT, **NAMED[odd]).identity([ROOT]), good())
    assert by_tcp == (odd == "several addresses")
    assert by_grpc == (by_tcp or odd == "its address as a name")


@pytest.mark.parametrize(
    ("names", "title", "taken"),
    [
        (["a.nodes.example"], "a", True),
        (["*.nodes.example"], "a", True),
        (["A.Nodes.example"], "a", True),
        (["a*.nodes.example"], "a", False),
        (["*.example"], "a", False),
        (["b.nodes.example"], "a.nodes.example", False),
        ([], "a.nodes.example", False),
    ],
)
def test_lanes_agree_on_names_but_for_common_names(names, title, taken):
    shown = issue(title, ROOT, names=names).identity([ROOT])
    by_grpc, by_tcp = verdicts(shown, replace(good(), name="a.nodes.example"))
    assert by_tcp == taken
    assert by_grpc == (taken or not names)
