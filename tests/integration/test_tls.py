"""Mutual TLS: who gets through, who doesn't, and that lanes keep to it."""

import contextlib

import grpc
import pytest
import torch
from certificates import certify, lock_key
from lane_cluster import HOST, TOKEN, config_of, layout_of

from model.errors import InputError
from ps.authority import RUN_NAME, new_identities
from ps.client import ParameterClient, RetryPolicy, ShardUnavailable
from ps.lanes.lane import LaneSettings
from ps.server import ShardServer
from ps.service import ShardService
from ps.shard import initial_state
from ps.tls import Identities, Identity, SecuritySettings, identities

LAYOUT = layout_of()
HASTY = RetryPolicy(attempt_s=2.0, deadline_s=3.0, backoff_s=0.05)
PATIENT = RetryPolicy(attempt_s=30.0, deadline_s=60.0, backoff_s=0.05)


@contextlib.contextmanager
def serving(identity, lanes=None):
    ranges = LAYOUT.shards[0]
    service = ShardService(config_of(ranges))
    server = ShardServer(service, HOST, TOKEN, 4, lanes, identity)
    server.start()
    vectors = (torch.ones(ranges.parameters.numel), torch.zeros(ranges.statistics.numel))
    service.load(initial_state(service.config.rule, *vectors))
    try:
        yield server.address
    finally:
        server.stop()


@contextlib.contextmanager
def calling(address, identity, lanes=None, retry=PATIENT):
    client = ParameterClient(
        [address], LAYOUT, TOKEN, retry, lanes or LaneSettings(), identity=identity
    )
    try:
        yield client
    finally:
        client.close()


def exchange(client):
    """A pull and a push of ones; returns the receipt's version and what was pulled."""
    layout = client.layout
    parameters, statistics = torch.empty(layout.num_parameters), torch.empty(layout.num_statistics)
    versions = client.pull(parameters, statistics)
    (receipt,) = client.push(
        0, 0, 0, versions, 1, torch.ones_like(parameters), torch.zeros_like(statistics)
    )
    return receipt.version, parameters


@pytest.fixture(scope="module")
def own() -> Identities:
    return new_identities()


USED = [("auto", "shm"), ("shm", "shm"), ("tcp", "tcp"), ("grpc", "grpc")]


@pytest.mark.parametrize(("choice", "used"), USED)
def test_a_run_of_one_authority_pulls_and_pushes(own, choice, used):
    lanes = LaneSettings(choice=choice)
    with serving(own.server, lanes) as address, calling(address, own.caller, lanes) as client:
        assert client.connect() == [used]
        version, parameters = exchange(client)
        assert version == 0
        assert (parameters == 1).all()


def test_without_shared_memory_it_is_tcp(own, monkeypatch):
    """Keys then go through a file of this user's alone."""
    monkeypatch.delattr("os.memfd_create")
    with serving(own.server) as address, calling(address, own.caller) as client:
        assert client.connect() == ["tcp"]
        assert exchange(client)[0] == 0


def strangers(own):
    other = new_identities()
    return {
        "nobody": None,
        "another run": other.caller,
        "another run that trusts ours": Identity(
            own.caller.authorities, other.caller.certificate, other.caller.key, RUN_NAME
        ),
        "a server": own.server,
    }


@pytest.mark.parametrize(
    "who", ["nobody", "another run", "another run that trusts ours", "a server"]
)
def test_a_stranger_does_not_get_through(own, who):
    with (
        serving(own.server) as address,
        calling(address, strangers(own)[who], retry=HASTY) as client,
        pytest.raises(ShardUnavailable),
    ):
        client.describe()


def test_a_caller_does_not_pass_for_a_server(own):
    with (
        serving(own.caller) as address,
        calling(address, own.caller, retry=HASTY) as client,
        pytest.raises(ShardUnavailable),
    ):
        client.describe()


def test_a_certificate_does_not_stand_in_for_the_token_and_refusals_are_counted(own):
    with serving(own.server) as address, calling(address, own.caller) as client:
        thief = ParameterClient([address], LAYOUT, "wrong", PATIENT, identity=own.caller)
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                thief.describe()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        thief.close()
        assert client.describe()[0].unauthenticated == 3


def test_files_of_ones_own_serve_and_call(own, tmp_path):
    """Certificates for both uses, by address, as people's authorities issue them."""
    paths = certify(tmp_path, HOST)
    found = identities(SecuritySettings(tls="files", **paths))
    assert found is not None
    for choice in ("tcp", "grpc"):
        lanes = LaneSettings(choice=choice)
        with serving(found.server) as address, calling(address, found.caller, lanes) as client:
            assert exchange(client)[0] == 0
            assert client.lanes == [choice]
    elsewhere = identities(SecuritySettings(tls="files", **certify(tmp_path, "127.0.0.9")))
    assert elsewhere is not None
    with (
        serving(elsewhere.server) as address,
        calling(address, elsewhere.caller, retry=HASTY) as client,
        pytest.raises(ShardUnavailable),
    ):
        client.describe()


def test_files_that_can_not_be_read_are_named(tmp_path):
    paths = certify(tmp_path, HOST)
    (tmp_path / "key_file.pem").write_text("no key")
    with pytest.raises(InputError, match=r"security\.key_file.*no PEM"):
        identities(SecuritySettings(tls="files", **paths))
    (tmp_path / "authority_file.pem").unlink()
    with pytest.raises(InputError, match=r"security\.authority_file.*No such file"):
        identities(SecuritySettings(tls="files", **paths))


@pytest.mark.parametrize("mistake", ["another key", "a key with a password", "no certificate"])
def test_files_that_do_not_fit_are_named(tmp_path, mistake):
    paths = certify(tmp_path, HOST)
    key, certificate = tmp_path / "key_file.pem", tmp_path / "certificate_file.pem"
    if mistake == "another key":
        (tmp_path / "other").mkdir()
        paths["key_file"] = certify(tmp_path / "other", HOST)["key_file"]
    elif mistake == "no certificate":
        certificate.write_bytes(key.read_bytes())
    else:
        lock_key(key)
    with pytest.raises(InputError, match=r"security\.authority_file, certificate_file, key_file"):
        identities(SecuritySettings(tls="files", **paths))


def test_a_key_does_not_show_in_logs(own):
    assert "PRIVATE" not in repr(own)
