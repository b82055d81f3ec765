"""Some cases of `benchmarks/wire_fuzz.py`, and that it would notice what it looks for."""

import sys
from pathlib import Path

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from lane_cluster import admitted, assert_unharmed, frame, held, push_ones

from protos import parameter_server_pb2 as pb

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def _on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("tls", [False, True])
def test_a_live_server_bears_malformed_traffic_and_a_push_too_many_is_noticed(tls):
    from wire_fuzz import IN_TLS, ROUND, Attack
    from wire_target import PromiseBroken, Target

    target = Target(tls=tls)
    try:
        attack = Attack(target, seed=1)
        for _ in range(3):
            attack.round(share=0.05)
            target.push_and_check()
        assert attack.counts.keys() > (ROUND | IN_TLS if tls else ROUND).keys()
        assert target.rss_num_bytes > 10_000_000
        (client, *_) = target._clients
        client.push(7, 0, 0, [0], 1, torch.zeros(352), torch.zeros(64))
        with pytest.raises(PromiseBroken, match="version"):
            target.push_and_check()
    finally:
        target.kill()


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_what_is_not_acted_on_is_told_from_what_is(seed):
    from wire_cases import Cases, body_num_bytes, is_acted_on

    cases = Cases(seed)
    assert not is_acted_on(cases.lane_stream())
    with pytest.raises(DecodeError):
        pb.EnterRequest.FromString(cases.control(pb.EnterRequest))
    push = cases.push()
    whole = frame(push=push) + bytes(body_num_bytes(push.dtype))
    assert is_acted_on(frame(pull=pb.PullRequest()) + whole)
    assert not is_acted_on(whole[:-1])
    assert is_acted_on(frame(pull=pb.PullRequest(wait_s=1.0)))


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_no_bytes_that_are_not_acted_on_change_a_shard(loaded, lane):
    from wire_cases import NUM_PARAMETERS, NUM_STATISTICS, Cases

    cluster = loaded()
    ranges = cluster.layout.shards[0]
    assert (ranges.parameters.numel, ranges.statistics.numel) == (NUM_PARAMETERS, NUM_STATISTICS)
    push_ones(cluster.client(), 0, 0)
    before = held(cluster.services[0])

    @settings(max_examples=100)
    @given(seed=st.integers(0, 2**32))
    def attacked(seed):
        from wire_handshakes import send_to_the_end

        with admitted(cluster.gate, lane) as wire:
            send_to_the_end(wire._socket, Cases(seed).lane_stream())

    attacked()
    assert_unharmed(cluster, before)
