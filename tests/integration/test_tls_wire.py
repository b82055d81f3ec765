"""The tcp lane inside TLS: who gets in, and what can be seen or changed on the way."""

import logging
import socket
import ssl

import lane_cluster
import pytest
import torch
from lane_cluster import (
    BFLOAT16,
    HOST,
    NUM_PARAMETERS,
    NUM_STATISTICS,
    PULL,
    admitted,
    assert_at,
    assert_unharmed,
    connect,
    held,
    layout_of,
    pull,
    push_frame,
    push_ones,
    push_shared_ones,
    relay_to,
)
from waiting import DEADLINE_S, background, eventually

from model.errors import InputError
from protos import parameter_server_pb2 as pb
from ps.authority import RUN_NAME, new_identities
from ps.lanes import gate as gate_module
from ps.lanes import tls_wire
from ps.lanes.lane import LaneError
from ps.lanes.tls_wire import TlsWire
from ps.tls import Identity
from ps.wire import AS_IS

OWN, OTHER = new_identities(), new_identities()


@pytest.fixture
def tls():
    return OWN


# Who gets in


STRANGERS = {
    "another run": OTHER.caller,
    "another run that trusts ours": Identity(
        OWN.caller.authorities, OTHER.caller.certificate, OTHER.caller.key, RUN_NAME
    ),
    "a server": OWN.server,
}


def nobody():
    """Takes any server, and shows nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def of_old():
    """One of ours, were it not for its version of TLS."""
    context = OWN.caller.caller_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def spoken_by(context):
    """What says something inside TLS, and whether it was answered."""

    def speak(connection, words):
        wire = TlsWire(connection, context, RUN_NAME)
        wire.within(DEADLINE_S)
        try:
            wire.handshake()
            wire.send_bytes(words)
            return bool(wire.receive_bytes(1))
        except LaneError:
            return False
        finally:
            wire.close()

    return speak


def in_the_clear(connection, words):
    with connection:
        connection.sendall(words)
        try:
            while data := connection.recv(1 << 16):
                assert data[:1] == b"\x15", "more than TLS's alert"
        except ConnectionResetError:
            pass
    return False


WAYS = {
    "nobody": spoken_by(nobody()),
    "an old client": spoken_by(of_old()),
    "in the clear": in_the_clear,
} | {who: spoken_by(identity.caller_context()) for who, identity in STRANGERS.items()}


def push_of_everything():
    return push_frame() + b"\0" * 4 * (NUM_PARAMETERS + NUM_STATISTICS)


@pytest.mark.parametrize("who", WAYS)
def test_a_stranger_with_a_good_ticket_has_no_effect(loaded, who, caplog):
    """And the ticket is as good as before."""
    cluster = loaded()
    push_ones(cluster.client(), 0, 0)
    before = held(cluster.services[0])
    ticket = cluster.gate.offer().ticket
    assert not WAYS[who](connect(cluster.gate, "tcp"), ticket + push_of_everything())
    eventually(lambda: cluster.gate.num_connections == 0)
    assert_unharmed(cluster, before)
    assert cluster.gate._tickets.redeem(ticket)
    assert "bug" not in caplog.text


def test_one_of_ours_is_answered(loaded):
    """So it is not for another reason that strangers aren't."""
    cluster = loaded()
    speak = spoken_by(OWN.caller.caller_context())
    assert speak(connect(cluster.gate, "tcp"), cluster.gate.offer().ticket)
    assert not speak(connect(cluster.gate, "tcp"), bytes(32))


def hello():
    """How a client begins."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = OWN.caller.caller_context().wrap_bio(incoming, outgoing, server_hostname=RUN_NAME)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize(
    "said",
    [b"", b"\x16", hello()[:100], hello()],
    ids=["nothing", "a byte", "half a hello", "a hello"],
)
def test_strangers_who_stop_in_the_handshake_hold_nobody_up_and_are_cut_off(
    loaded, monkeypatch, said
):
    cluster = loaded()
    before = held(cluster.services[0])
    strangers = [connect(cluster.gate, "tcp") for _ in range(5)]
    for each in strangers:
        each.sendall(said)
    eventually(lambda: cluster.gate.num_connections == 5)
    client = cluster.client("tcp")
    assert_at(client, [0])  # while they stand there
    client.close()
    for each in strangers:
        each.close()
    monkeypatch.setattr(gate_module, "ADMISSION_S", 0.05)
    last = connect(cluster.gate, "tcp")
    last.sendall(said)
    eventually(lambda: cluster.gate.num_connections == 0)
    monkeypatch.undo()
    last.close()
    assert_unharmed(cluster, before)


def test_strangers_who_say_nothing_count_toward_the_limit(loaded, caplog):
    cluster = loaded()
    cluster.gate._max_connections = 3
    strangers = [connect(cluster.gate, "tcp") for _ in range(3)]
    eventually(lambda: cluster.gate.num_connections == 3)
    with connect(cluster.gate, "tcp") as one_more:
        assert one_more.recv(1) == b""
    with caplog.at_level(logging.WARNING, "ps.lanes.choice"):
        cluster.gate._offer.shm_socket = ""
        client = cluster.client("auto")
        assert_at(client, [0])
    assert client.lanes == ["grpc"]
    # The gate's own words on who was turned away may come before or after.
    said = [r.getMessage() for r in caplog.records if r.name == "ps.lanes.choice"]
    assert ["no tcp lane" in each for each in said] == [True]
    for each in strangers:
        each.close()
    eventually(lambda: cluster.gate.num_connections == 0)
    assert_at(cluster.client("tcp"), [0])


@pytest.mark.parametrize("stranger", [OTHER.server, OWN.caller], ids=["another run", "a caller"])
def test_a_worker_does_not_take_another_server_for_its_own(loaded, caplog, stranger):
    """At once, without a ticket shown, and it says why it goes on with gRPC."""
    cluster = loaded()
    with socket.create_server((HOST, 0)) as listening:
        cluster.gate._offer.tcp_port = listening.getsockname()[1]
        cluster.gate._offer.shm_socket = ""
        heard = background(lambda: take_one(listening, stranger))
        with caplog.at_level(logging.WARNING, "ps.lanes.choice"):
            client = cluster.client("auto")
            assert_at(client, [0])
        assert heard.result(DEADLINE_S) == b""
        assert client.lanes == ["grpc"]
        assert any("no tcp lane (the peer's certificate" in each for each in caplog.messages)
        heard = background(lambda: take_one(listening, stranger))
        with pytest.raises(InputError, match=r'lanes\.choice = "tcp".*certificate is not good'):
            cluster.client("tcp").connect()
        assert heard.result(DEADLINE_S) == b""


def take_one(listening, identity):
    """What one connection says inside TLS."""
    wire = TlsWire(listening.accept()[0], identity.server_context())
    wire.within(DEADLINE_S)
    try:
        wire.handshake()
        return wire.receive_bytes(1)
    except LaneError:
        return b""
    finally:
        wire.close()


# On the way


def tickets_of(gate, monkeypatch):
    """Those that it issues from now on."""
    tickets, issue = [], gate._tickets.issue

    def noted():
        tickets.append(issue())
        return tickets[-1]

    monkeypatch.setattr(gate._tickets, "issue", noted)
    return tickets


@pytest.mark.parametrize("tls", [None, OWN], ids=["plain", "tls"])
@pytest.mark.parametrize("wire", [AS_IS, BFLOAT16], ids=["float32", "bfloat16"])
def test_vectors_come_exact_and_can_be_read_on_the_way_without_tls_alone(
    loaded, monkeypatch, wire, tls
):
    seen, sent = [], lane_cluster._send

    def overheard(sink, data, fds):
        seen.append(bytes(data))
        sent(sink, data, fds)

    monkeypatch.setattr(lane_cluster, "_send", overheard)
    cluster = loaded(layout_of(1, 300_000))
    tickets = tickets_of(cluster.gate, monkeypatch)
    relay, _ = relay_to(cluster, "tcp")
    client = cluster.client("tcp")
    push_ones(client, 0, 0, value=-1.2345678)
    _, parameters, statistics = pull(client)
    expected = torch.tensor(1.2345678).to(wire.push_dtype)
    assert (parameters == expected.float()).all()
    assert (statistics == 1).all()
    assert client.lanes == ["tcp"]
    stream, vectors = b"".join(seen), [-expected.expand(8), expected.expand(8)]
    assert len(stream) > 2 * 300_000 * expected.nbytes
    known = [bytes(each.contiguous().view(torch.uint8)) for each in vectors] + tickets
    assert [part in stream for part in known] == [tls is None] * len(known)
    assert len(tickets) == 2
    relay.close()


@pytest.mark.parametrize("way", [0, 1], ids=["up", "down"])
@pytest.mark.parametrize("position", [0, 300, 3_000, 100_000])
def test_a_bit_that_is_changed_on_the_way_changes_nothing(loaded, monkeypatch, way, position):
    """The connection ends, and what was under way is done again, once."""
    cluster = loaded(layout_of(1, 300_000))
    relay, _ = relay_to(cluster, "tcp")
    passed, changed, sent = [0, 0], [], lane_cluster._send
    far_port = cluster.gate._listeners[0].listening.getsockname()[1]

    def tampering(sink, data, fds):
        this_way = int(sink.getpeername()[1] != far_port)
        start, passed[this_way] = passed[this_way], passed[this_way] + len(data)
        if this_way == way and not changed and start <= position < passed[way]:
            data = bytearray(data)
            data[position - start] ^= 1
            changed.append(position)
        sent(sink, bytes(data), fds)

    monkeypatch.setattr(lane_cluster, "_send", tampering)
    client = cluster.client("tcp")
    for sequence in range(2):
        (receipt,) = push_shared_ones(client, 0, sequence)
        assert receipt.version == sequence
        assert_at(client, [sequence + 1])
    assert changed
    assert relay.num_connections >= 3
    assert client.lanes == ["tcp"]
    relay.close()


def test_a_wire_that_another_thread_shuts_down_sends_nothing_in_the_clear(monkeypatch):
    """Not even if the socket is still open then."""
    near, far = socket.socketpair()
    with near, far:
        wire = TlsWire(near, OWN.caller.caller_context(), RUN_NAME)
        peer = background(lambda: take_one_end(far))
        wire.within(DEADLINE_S)
        wire.handshake()
        raw = peer.result(DEADLINE_S)
        with monkeypatch.context() as unshut:
            unshut.setattr(socket.socket, "shutdown", lambda *_: None)
            wire.shutdown()
            wire.send_bytes(b"a secret")
        assert b"a secret" not in raw.recv(1 << 16)
        wire.close()
        raw.close()


def take_one_end(connection):
    """The socket under a served wire, once hands are shaken."""
    wire = TlsWire(connection, OWN.server.server_context())
    wire.within(DEADLINE_S)
    wire.handshake()
    return socket.socket(fileno=wire._socket.detach())


def test_a_connection_whose_keys_are_worn_is_followed_by_another(loaded, monkeypatch):
    monkeypatch.setattr(tls_wire, "MAX_RECORDS", 200)
    cluster = loaded(layout_of(1, 300_000))  # 74 records each way
    relay, _ = relay_to(cluster, "tcp")
    client = cluster.client("tcp")
    for sequence in range(10):
        push_shared_ones(client, 0, sequence)
        assert_at(client, [sequence + 1])
    assert 6 <= relay.num_connections <= 8
    assert client.lanes == ["tcp"]
    client.close()
    eventually(lambda: cluster.gate.num_connections == 0)
    relay.close()


def test_calls_that_come_together_are_answered_in_turn(loaded):
    """In one record: a server that waited for the socket alone would wait for ever."""
    cluster = loaded()
    with admitted(cluster.gate, "tcp", caller=OWN.caller) as wire:
        wire.send_bytes(PULL * 3)
        for _ in range(3):
            answer = wire.receive(pb.LaneAnswer)
            assert answer.pull.num_parameters == NUM_PARAMETERS
            wire.receive_bytes(4 * (NUM_PARAMETERS + NUM_STATISTICS))
