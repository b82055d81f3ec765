"""Wire types in all lanes: error feedback over broken connections, and dtypes that are nonsense."""

from itertools import chain

import grpc
import pytest
import torch
from lane_cluster import (
    BFLOAT16,
    NUM_PARAMETERS,
    NUM_STATISTICS,
    admitted,
    assert_at,
    assert_holds_the_same,
    frame,
    held,
    layout_of,
    pull,
    push_ones,
    relay_to,
)
from waiting import eventually

from protos import parameter_server_pb2 as pb
from ps.client import ModelState
from ps.consistency import Sync
from ps.rules import SGD
from ps.shard import Outcome, initial_state
from ps.wire import AS_IS, WireSettings

FEEDBACK = WireSettings(push="bfloat16", error_feedback=True)


@pytest.fixture(params=["shm", "tcp", "grpc"])
def lane(request):
    return request.param


class Reference:
    """What a shard and a worker's residual come to, with SGD at a learning rate of 1."""

    def __init__(self, numel):
        self.parameters, self.residual = torch.zeros(numel), torch.zeros(numel)

    def push(self, gradient):
        total = gradient + self.residual
        sent = total.to(torch.bfloat16).float()
        if torch.isfinite(sent).all():
            self.parameters, self.residual = self.parameters - sent, total - sent


# In bytes up or down: while a push travels, or its receipt. Over gRPC a receipt has but a few.
CUTS = {
    "shm": [(2500, None), (None, 3000), (4500, None), (None, 4500)],
    "tcp": [(50_000, None), (None, 3000), (2080, None), (200_000, None)],
    "grpc": [(50_000, None), (None, 150), (200_000, None)],
}


def test_error_feedback_is_applied_once_over_broken_connections(loaded, lane):
    numel = 30_000
    cluster = loaded(layout_of(1, numel), wire=FEEDBACK)
    relay, addresses = relay_to(cluster, lane)
    client, reference = cluster.client(lane, addresses=addresses), Reference(numel)
    relay.cuts = list(CUTS[lane])
    generator = torch.Generator().manual_seed(2)
    for sequence in range(8):
        gradient = torch.randn(numel, generator=generator)
        if sequence == 3:
            gradient[7] = torch.nan
        (receipt,) = client.push(0, 0, sequence, [0], 2, gradient, torch.zeros(NUM_STATISTICS))
        dropped = receipt.outcome is Outcome.NOT_FINITE
        assert dropped == (sequence == 3)
        reference.push(gradient)
    assert relay.num_connections > len(CUTS[lane])
    assert torch.equal(client.shards[0]._cast.residual(), reference.residual)
    assert torch.equal(pull(client)[1], reference.parameters)
    assert client.lanes == [lane]
    relay.close()


def test_each_shard_is_owed_what_it_lacks(loaded, lane):
    cluster = loaded(layout_of(3, 5008), wire=FEEDBACK)
    client, reference = cluster.client(lane), Reference(5008)
    for sequence in range(3):
        gradient = torch.randn(5008, generator=torch.Generator().manual_seed(sequence))
        client.push(0, 0, sequence, [0] * 3, 2, gradient, torch.zeros(NUM_STATISTICS))
        reference.push(gradient)
    owed = torch.cat([shard._cast.residual() for shard in client.shards])
    assert torch.equal(owed, reference.residual)
    assert torch.equal(pull(client)[1], reference.parameters)


def test_rounded_gradients_are_summed_in_float32(loaded, lane):
    cluster = loaded(policy=Sync(), wire=WireSettings(push="bfloat16"))
    client = cluster.client(lane)
    for worker in range(3):
        push_ones(client, worker, 0, value=1 + 2.0**-7 * worker)
    # A mean of which bf16 has no more than 1.0078125.
    torch.testing.assert_close(pull(client)[1], torch.full((NUM_PARAMETERS,), -1 - 2.0**-7))


def test_workers_of_one_shard_may_use_different_wires(loaded, lane):
    cluster = loaded()
    for sequence, (pulled, pushed) in enumerate(
        [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
    ):
        client = cluster.client(lane, wire=WireSettings(pull=pulled, push=pushed))
        push_ones(client, sequence, 0)
        assert_at(client, [sequence + 1])


def test_a_pull_rounds_what_it_brings_and_not_what_is_kept(loaded, lane):
    cluster = loaded()
    start = torch.full((NUM_PARAMETERS,), 1 + 2.0**-12)
    state = initial_state(SGD(), start, torch.full((NUM_STATISTICS,), 1 + 2.0**-12))
    client = cluster.client(lane, wire=BFLOAT16)
    client.load(ModelState(state.clocks, state.vectors, {}))
    _, parameters, statistics = pull(client)
    assert (parameters == 1).all()
    assert (statistics == 1 + 2.0**-12).all()
    assert (held(cluster.services[0])[0].vectors["parameters"] == 1 + 2.0**-12).all()


@pytest.mark.parametrize("lane", ["tcp", "grpc"])
@pytest.mark.parametrize(("wire", "num_bytes"), [(AS_IS, 4), (BFLOAT16, 2)], ids=["fp32", "bf16"])
def test_bf16_takes_half_the_bytes(loaded, lane, wire, num_bytes):
    numel = 300_000
    cluster = loaded(layout_of(1, numel))
    relay, addresses = relay_to(cluster, lane)
    client = cluster.client(lane, addresses=addresses, wire=wire)
    for way, call in ((1, pull), (0, lambda client: push_ones(client, 0, 0))):
        call(client)
        eventually(lambda way=way: relay.passed[way] >= num_bytes * numel)
        assert relay.passed[way] < 1.05 * num_bytes * numel
    relay.close()


# What is refused


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_a_pull_in_an_unknown_dtype_is_refused_and_the_connection_goes_on(loaded, lane):
    cluster = loaded()
    with admitted(cluster.gate, lane, caller=cluster.caller) as wire:
        wire.send_bytes(frame(pull=pb.PullRequest(dtype=7)))
        refusal = wire.receive(pb.LaneAnswer).refusal
        assert (refusal.status, refusal.reason) == ("INVALID_ARGUMENT", "no elements of dtype 7")
        wire.send_bytes(frame(pull=pb.PullRequest()))
        assert wire.receive(pb.LaneAnswer).pull.num_parameters == NUM_PARAMETERS


BODIES = {
    "an unknown dtype": (7, 4 * NUM_PARAMETERS),
    "bf16 in the bytes of float32": (pb.BFLOAT16, 4 * NUM_PARAMETERS),
    "float32 in the bytes of bf16": (pb.FLOAT32, 2 * NUM_PARAMETERS),
    "bf16 short by a byte": (pb.BFLOAT16, 2 * NUM_PARAMETERS - 1),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_grpc_push_whose_bytes_are_not_of_its_dtype_is_refused(loaded, name):
    cluster = loaded()
    client, before = cluster.client("grpc"), held(cluster.services[0])
    dtype, num_bytes = BODIES[name]
    header = pb.PushHeader(num_samples=1, dtype=dtype).SerializeToString()
    body = bytes(num_bytes + 4 * NUM_STATISTICS)
    streams = client.shards[0]._route.bytes
    with pytest.raises(grpc.RpcError) as refused:
        streams._push(chain((header, body)), timeout=30, metadata=streams._metadata)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_holds_the_same(before, cluster.services[0])


def test_a_grpc_pull_in_an_unknown_dtype_is_refused(loaded):
    cluster = loaded()
    streams = cluster.client("grpc").shards[0]._route.bytes
    request = pb.PullRequest(dtype=7).SerializeToString()
    with pytest.raises(grpc.RpcError, match="no elements of dtype 7") as refused:
        list(streams._pull(request, timeout=30, metadata=streams._metadata))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
