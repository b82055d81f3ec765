"""Connections that break at any byte: every push is settled once, every pull is whole."""

import logging
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
from lane_cluster import BFLOAT16, assert_at, layout_of, push_shared_ones, relay_to
from waiting import eventually

from ps.shard import Outcome, Receipt
from ps.wire import AS_IS


@pytest.fixture(params=["shm", "tcp", "grpc"])
def lane(request):
    return request.param


@pytest.fixture(params=[AS_IS, BFLOAT16], ids=["float32", "bfloat16"])
def wire(request):
    return request.param


def offsets(num_bytes):
    """One of each kind: nothing, in the ticket or first frames, in the body, almost all, all."""
    kinds = {0, 1, 31, 32, 33, 36, 50, 2079, 2080, 2081, num_bytes // 2, num_bytes - 1, num_bytes}
    return sorted(offset for offset in kinds if 0 <= offset <= num_bytes)


def test_a_push_whose_connection_is_cut_anywhere_is_applied_once(loaded, lane):
    cluster = loaded(layout_of(1, 300_000))
    relay, addresses = relay_to(cluster, lane)
    sequences = count()

    def push_once(*cut):
        client, sequence = cluster.client(lane, addresses=addresses), next(sequences)
        relay.cuts = list(cut)
        assert push_shared_ones(client, 0, sequence) == [
            Receipt(Outcome.APPLIED, sequence, sequence, 1.0)
        ]
        assert client.lanes == [lane]
        client.close()
        eventually(relay.is_idle)

    push_once()
    up, down = relay.passed
    relay.num_connections, cuts = 0, [(each, None) for each in offsets(up)]
    cuts += [(None, each) for each in offsets(down)[:-1]]
    for cut in cuts:
        push_once(cut)
    assert relay.num_connections > len(cuts)
    assert_at(cluster.client(lane, addresses=addresses), [1 + len(cuts)])
    eventually(lambda: not any(cluster.services[0].in_use.values()))
    relay.close()


def test_a_pull_whose_connection_is_cut_anywhere_is_whole(loaded, lane):
    cluster = loaded(layout_of(1, 300_000))
    relay, addresses = relay_to(cluster, lane)
    push_shared_ones(cluster.client(), 0, 0)

    def pull_once(*cut):
        client = cluster.client(lane, addresses=addresses)
        relay.cuts = list(cut)
        assert_at(client, [1])
        client.close()
        eventually(relay.is_idle)

    pull_once()
    up, down = relay.passed
    cuts = [(each, None) for each in offsets(up)[:-1]]
    cuts += [(None, each) for each in offsets(down)[:-1]]
    relay.num_connections = 0
    for cut in cuts:
        pull_once(cut)
    assert relay.num_connections >= len(cuts)
    eventually(lambda: not any(cluster.services[0].in_use.values()))
    relay.close()


def test_work_is_conserved_over_concurrent_workers_and_broken_connections(loaded, lane):
    """Every third connection breaks somewhere; every push is settled once, as its receipt says.

    Somewhere behind its admission: a retry may get the cut of another worker, and a lane that
    twice in a row lets nobody in is an error.
    """
    cluster = loaded(layout_of(1, 4000))
    relay, addresses = relay_to(cluster, lane)
    admitted = cluster.client(lane, addresses=addresses)
    admitted.connect()
    admitted.close()
    eventually(relay.is_idle)
    admission_num_bytes = relay.passed[0]

    def work(worker):
        receipts = []
        for sequence in range(8):
            client = cluster.client(lane, addresses=addresses)
            if sequence % 3 == 1:
                num_bytes = (37 * sequence + 7000 * worker) % 16000
                relay.cuts.append((admission_num_bytes + num_bytes, None))
            receipts += push_shared_ones(client, worker, sequence)
            client.close()
        return receipts

    with ThreadPoolExecutor(3) as threads:
        receipts = [each for some in threads.map(work, range(3)) for each in some]
    assert {receipt.outcome for receipt in receipts} == {Outcome.APPLIED}
    assert sorted(receipt.version for receipt in receipts) == list(range(24))
    assert_at(cluster.client(lane), [24])
    relay.close()


# From one lane to the next


@pytest.mark.parametrize("cut", [(0, None), (40, None), (2080, None), (None, 0), (None, 20)])
def test_a_lane_that_breaks_again_and_again_is_given_up_for_the_next(loaded, caplog, cut):
    """First shm, then tcp; what is under way is neither lost nor done twice."""
    cluster = loaded(layout_of(1, 300_000))
    relays = [relay_to(cluster, lane)[0] for lane in ("shm", "tcp")]
    client = cluster.client("auto")
    push_shared_ones(client, 0, 0)
    assert client.lanes == ["shm"]
    for relay in relays:
        relay.default = cut
    client.close()
    client = cluster.client("auto")
    with caplog.at_level(logging.WARNING, "ps.lanes.choice"):
        assert push_shared_ones(client, 0, 1) == [Receipt(Outcome.APPLIED, 1, 1, 1.0)]
    assert_at(client, [2])
    assert client.lanes == ["grpc"]
    assert ["no shm lane" in m or "no tcp lane" in m for m in caplog.messages] == [True] * 2
    for relay in relays:
        relay.close()
