"""What a run is said to be held up by, for runs whose seconds are made up."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynception.diagnosis import Setup, ShardTime, WorkerTime, diagnose

WALL_S = 100.0


def worker(number=0, *, pushes=100, samples=1000, data=0.0, pull=0.0, compute=0.0, push=0.0):
    return WorkerTime(number, pushes, samples, data, pull, compute, push)


def shard(number=0, *, apply=0.0, queue=0.0, gate=0.0, standby=0.0):
    return ShardTime(number, WALL_S, apply, queue, gate, standby)


def test_workers_that_compute_are_bound_by_that():
    found = diagnose([worker(compute=90, pull=5, push=5)], [shard(apply=4)], Setup())
    assert found.bottleneck == "compute"
    assert "90% of their time: compute-bound" in found.text
    assert not found.notes


def test_waiting_for_images_is_bound_by_decoding():
    found = diagnose([worker(data=60, compute=40)], [shard(apply=1)], Setup())
    assert found.bottleneck == "data"
    assert "wait 60% for images: decoding-bound" in found.text
    assert "data.num_threads" in found.text


def test_pulls_over_a_network_while_servers_idle_are_bound_by_the_network():
    setup = Setup(num_servers=2, lanes=("tcp",))
    found = diagnose([worker(pull=38, push=12, compute=50)], [shard(0), shard(1, apply=5)], setup)
    assert found.bottleneck == "network"
    assert (
        "wait 38% for pulls and 12% for pushes, and servers are busy for at most 5%" in found.text
    )
    assert "add 2 servers on other nodes" in found.text
    assert "pull bf16" in found.text
    narrow = Setup(lanes=("tcp",), pull="bfloat16", overlap=True)
    text = diagnose([worker(pull=38, push=12, compute=50)], [shard()], narrow).text
    assert "pull bf16" not in text
    assert "push bf16" in text
    assert "pipeline.overlap" not in text
    sync = Setup("sync", lanes=("tcp",), push="bfloat16")
    text = diagnose([worker(pull=38, push=12, compute=50)], [shard()], sync).text
    assert "push bf16" not in text
    assert "pipeline.overlap" not in text, "only asynchronous workers may"


@pytest.mark.parametrize(
    ("lanes", "bottleneck"), [(("shm",), "memory"), (("shm", "tcp"), "network")]
)
def test_workers_on_some_other_host_make_it_a_matter_of_the_network(lanes, bottleneck):
    found = diagnose([worker(pull=38, push=12, compute=50)], [shard()], Setup(lanes=lanes))
    assert found.bottleneck == bottleneck


@pytest.mark.parametrize(("wait_s", "bottleneck"), [(14, "compute"), (16, "data")])
def test_a_short_wait_is_no_bottleneck(wait_s, bottleneck):
    found = diagnose([worker(data=wait_s, compute=100 - wait_s)], [shard()], Setup())
    assert found.bottleneck == bottleneck


@pytest.mark.parametrize(("apply_s", "queue_s"), [(41, 0), (21, 20), (0, 41), (39, 0), (20, 19)])
def test_servers_are_to_blame_for_half_of_what_workers_wait_for_them(apply_s, queue_s):
    times = [worker(pull=40, push=40, compute=20)]
    found = diagnose(times, [shard(apply=apply_s, queue=queue_s)], Setup(lanes=("tcp",)))
    assert found.bottleneck == ("servers" if apply_s + queue_s > 40 else "network")


def test_pulls_in_memory_while_servers_idle_are_bound_by_copying():
    setup = Setup(lanes=("shm",))
    found = diagnose([worker(pull=38, push=12, compute=50)], [shard(apply=5)], setup)
    assert found.bottleneck == "memory"
    assert "bf16" not in found.text


def test_pushes_that_queue_at_a_busy_server_are_bound_by_servers():
    times = [worker(i, push=60, compute=40) for i in range(4)]
    found = diagnose(times, [shard(apply=90, queue=130)], Setup(lanes=("shm",)))
    assert found.bottleneck == "servers"
    assert "the server is busy for up to 90%" in found.text
    assert "add 1 (scaling.num_servers)" in found.text


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_pushes_that_wait_mainly_for_standbys_are_bound_by_replication(lane):
    times = [worker(i, pull=5, push=55, compute=40) for i in (0, 1)]
    shards = [shard(0, apply=5, standby=20), shard(1, apply=9, queue=1, standby=80)]
    found = diagnose(times, shards, Setup(num_servers=2, lanes=(lane,)))
    assert found.bottleneck == "standbys"
    assert "55% for pushes, most of it until standbys have carried out the pushes" in found.text
    assert "add 2 servers" in found.text
    assert "scaling.replicas = 0" in found.text
    assert "push bf16" in found.text
    narrow = Setup(lanes=(lane,), push="bfloat16")
    text = diagnose(times, shards, narrow).text
    assert "push bf16" not in text
    assert "add 1 server on other nodes" in text


@pytest.mark.parametrize(("standby_s", "bottleneck"), [(39, "network"), (41, "standbys")])
def test_standbys_are_to_blame_for_half_of_what_workers_wait_for_servers(standby_s, bottleneck):
    times = [worker(pull=40, push=40, compute=20)]
    found = diagnose(times, [shard(apply=1, standby=standby_s)], Setup(lanes=("tcp",)))
    assert found.bottleneck == bottleneck


def test_servers_that_take_longer_than_their_standbys_are_to_blame_themselves():
    found = diagnose([worker(push=80, compute=20)], [shard(queue=51, standby=50)], Setup())
    assert found.bottleneck == "servers"


@pytest.mark.parametrize(
    ("mode", "mend"),
    [
        ("sync", "consistency.backup_workers"),
        ("bounded", "consistency.slack"),
        ("averaging", "consistency.asynchronous"),
    ],
)
def test_pulls_that_shards_hold_back_wait_for_others(mode, mend):
    times = [worker(0, pull=80, compute=20), worker(1, compute=100)]
    shards = [shard(0, gate=70), shard(1, gate=78)]
    found = diagnose(times, shards, Setup(mode=mode, num_servers=2, lanes=("tcp",)))
    assert found.bottleneck == "others"
    assert found.shares["others"] == 78 / 200
    assert found.shares["pull"] == pytest.approx(2 / 200)
    assert "wait 39% for one another, worker 1 the longest" in found.text
    assert mend in found.text
    assert found.stragglers == (1,)


def test_ranks_meet_before_each_step_and_then_reduce():
    late = diagnose([worker(0, pull=60, compute=40), worker(1, compute=98, pull=2)], [], ALLREDUCE)
    assert late.bottleneck == "others"
    slow = diagnose([worker(i, push=50, compute=50) for i in (0, 1)], [], ALLREDUCE)
    assert slow.bottleneck == "network"
    assert "gradients to be reduced" in slow.text


ALLREDUCE = Setup(mode="allreduce")


def test_a_slow_worker_is_named_whatever_holds_the_run_up():
    quick = [worker(i, samples=1000, compute=100) for i in (0, 2)]
    found = diagnose([*quick, worker(1, pushes=13, samples=125, compute=100)], [shard()], Setup())
    assert found.stragglers == (1,)
    (note,) = found.notes
    assert "worker 1 is a straggler: it takes 8.0 times as long" in note
    assert "stale" in note


def test_stragglers_are_measured_against_the_others_by_their_own_part_and_slowest_first():
    """What they wait for servers and other workers is not their own."""
    times = [
        worker(0, compute=90, pull=10),
        worker(1, data=90, compute=90),
        worker(2, compute=95, push=5),
        worker(3, compute=270),
        worker(4, compute=90, pull=1000),
    ]
    found = diagnose(times, [shard()], Setup())
    assert found.stragglers == (3, 1)
    two = diagnose([worker(0, compute=100), worker(1, compute=160)], [shard()], Setup())
    (note,) = two.notes
    assert "worker 1 is a straggler: it takes 1.6 times as long" in note


def test_a_shard_that_does_more_than_others_and_next_to_nothing_is_not_named():
    shards = [shard(0, apply=1), shard(1, apply=9), shard(2, apply=1)]
    assert not diagnose([worker(compute=100)], shards, Setup(num_servers=3)).notes


def test_one_of_two_shards_that_does_more_is_named():
    shards = [shard(0, apply=10), shard(1, apply=40), shard(2, apply=12)]
    found = diagnose([worker(compute=90, push=10)], shards, Setup(num_servers=3))
    (note,) = found.notes
    assert "shard 1 is skewed: busy for 40% of the time" in note


@pytest.mark.parametrize(
    "times",
    [
        [],
        [worker(pushes=4, compute=10)],
        [worker(pushes=0)],
        [worker(0, pushes=5, compute=10), worker(1, pushes=4, compute=10)],
    ],
)
def test_little_that_was_measured_is_not_judged(times):
    found = diagnose(times, [], Setup())
    assert found.bottleneck == "unknown"
    assert found.shares == {}


amounts = st.integers(0, 1000).map(float)
times = st.builds(
    WorkerTime, st.integers(0, 9), *[st.integers(0, 100)] * 2, amounts, amounts, amounts, amounts
)
loads = st.builds(ShardTime, st.integers(0, 9), amounts, amounts, amounts, amounts, amounts)
setups = st.builds(
    Setup,
    st.sampled_from(["async", "bounded", "sync", "averaging", "allreduce"]),
    st.integers(1, 9),
    lanes=st.sampled_from([(), ("shm",), ("tcp", "grpc")]),
)


@settings(deadline=None)
@given(st.lists(times, max_size=5), st.lists(loads, max_size=4), setups)
def test_shares_add_up_and_any_measurement_gets_words(workers, shards, setup):
    found = diagnose(workers, shards, setup)
    assert found.text
    if found.shares:
        assert sum(found.shares.values()) == pytest.approx(1)
        assert min(found.shares.values()) >= 0
    json.dumps(found.to_json(), allow_nan=False)
