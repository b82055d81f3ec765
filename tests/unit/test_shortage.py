"""What a run that doesn't fit on its cluster is told, and how long it waits for room."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynception import cluster, reservation, worker_room
from asynception.config import TrainConfig
from asynception.controls import Controls
from asynception.failures import Stopped
from asynception.shortage import Part, There, amount, shortage
from model.errors import InputError

WORKER = Part("worker", {"memory": 2e9, "GPU": 1.0, "CPU": 4.0})
SERVER = Part("server", {"memory": 4e9})
EVALUATOR = Part("evaluator", {"CPU": 2.0})


def there(*nodes, free=None):
    total = {name: sum(node.get(name, 0) for node in nodes) for node in nodes for name in node}
    return There(nodes, total if free is None else {**total, **free})


NODE = {"memory": 64e9, "GPU": 4.0, "CPU": 64.0}


def test_says_who_needs_what_is_missing_and_which_settings_take_it():
    said = shortage([SERVER, EVALUATOR, *[WORKER] * 8], there(NODE, NODE, free={"GPU": 5.0}))
    assert said == (
        "the run needs 8 GPU (8 workers with 1 each), the cluster has 5 free of 8: lower "
        "scaling.num_workers or scaling.resources_per_worker.GPU, or add nodes"
    )


def test_counts_all_who_take_of_it_and_names_their_settings():
    server = Part("server", {"memory": 4e9, "CPU": 4.0})
    said = shortage([server, server, EVALUATOR, *[WORKER] * 2], there({**NODE, "CPU": 16.0}))
    assert said == (
        "the run needs 18 CPU (2 servers with 4 each, 1 evaluator with 2, 2 workers with 4 each), "
        "the cluster has 16 free: lower scaling.num_servers or scaling.num_workers or "
        "scaling.resources_per_server.CPU or evaluation.cpus or "
        "scaling.resources_per_worker.CPU, or add nodes"
    )


def test_servers_of_unlike_sizes_and_memory():
    servers = [Part("server", {"memory": 4e9}), Part("server", {"memory": 5e9})]
    said = shortage(servers, there({"memory": 8e9}))
    assert said == (
        "the run needs 9.0 GB of memory (2 servers with up to 5.0 GB each), the cluster has "
        "8.0 GB free: lower scaling.num_servers, or add nodes"
    )


def test_a_worker_of_many_processes_is_too_large_for_any_node():
    worker = Part("worker", {"GPU": 8.0}, num_processes=8)
    assert shortage([worker], there(NODE, NODE)) == (
        "one worker needs 8 GPU on one node, and none has that: lower "
        "scaling.processes_per_worker or scaling.resources_per_worker.GPU, or add larger nodes"
    )
    assert "lower" not in (shortage([SERVER], there({"memory": 3e9}, {"memory": 3e9})) or "")


AMOUNTS = st.dictionaries(st.sampled_from(["CPU", "GPU", "memory", "server"]), st.integers(1, 8))
PARTS = st.lists(st.builds(Part, st.sampled_from(["worker", "server"]), AMOUNTS), max_size=5)


@given(parts=PARTS, nodes=st.lists(AMOUNTS, min_size=1, max_size=4))
def test_silent_only_if_the_sums_and_each_part_fit(parts, nodes):
    found = there(*nodes)
    names = {name for part in parts for name in part.resources}
    sums = {name: sum(part.resources.get(name, 0) for part in parts) for name in names}
    fit = all(value <= found.free.get(name, 0) for name, value in sums.items())
    each = all(
        any(all(v <= node.get(k, 0) for k, v in part.resources.items()) for node in nodes)
        for part in parts
    )
    assert (shortage(parts, found) is None) == (fit and each)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("GPU", 0.5, "0.5 GPU"), ("memory", 3e9, "3.0 GB of memory"), ("memory", 3e6, "3.0 MB of m")],
)
def test_amounts(name, value, said):
    assert amount(name, value).startswith(said)


class Plan:
    """What waiting reads of a run's plan."""

    def __init__(self, timeout_s):
        self.config = TrainConfig.model_validate(
            {
                "data": {"train": "train", "val": "val"},
                "training": {"epochs": 1},
                "run": {"placement_timeout_s": timeout_s},
            }
        )


class Clock:
    """Time passes where it is waited for."""

    now_s = 0.0

    def monotonic(self):
        return self.now_s


class Group:
    """A placement group that has its room at a time."""

    def __init__(self, clock, ready_s, bundle_count):
        self.clock, self.ready_s, self.bundle_count = clock, ready_s, bundle_count

    @property
    def is_ready(self):
        return self.clock.now_s >= self.ready_s

    def wait(self, timeout_s):
        assert timeout_s == int(timeout_s) > 0, "Ray cuts off what is not whole"
        self.clock.now_s = min(self.clock.now_s + timeout_s, max(self.ready_s, self.clock.now_s))
        return self.is_ready


@pytest.fixture
def crowded(monkeypatch):
    """A cluster of which others hold all but five GPUs."""
    node = {"Alive": True, "Resources": NODE}
    dead = {"Alive": False, "Resources": {"GPU": 100.0}}
    monkeypatch.setattr(reservation.ray, "nodes", lambda: [node, dead, node])
    monkeypatch.setattr(reservation.ray, "available_resources", lambda: {**NODE, "GPU": 5.0})
    clock = Clock()
    monkeypatch.setattr(reservation, "time", clock)
    monkeypatch.setattr(
        reservation,
        "placement_group_table",
        lambda group: {"state": "CREATED" if group.is_ready else "PENDING"},
    )
    return clock


MISSING = "the run needs 8 GPU (8 workers with 1 each), the cluster has 5 free of 8"


SERVERS, WORKERS = [Part("server", {"server": 1.0})] * 2, [WORKER] * 8
"""All servers there are, and more workers than there is room for."""


def wait(clock, timeout_s, *, servers_s, workers_s):
    """What is said meanwhile, and in the end if there is no room; when each group has its own."""
    groups = [Group(clock, servers_s, len(SERVERS)), Group(clock, workers_s, len(WORKERS))]
    said = []
    controls = Controls(waiting=said.append)
    try:
        reservation._wait_for_room(groups, SERVERS + WORKERS, Plan(timeout_s), controls)
    except InputError as error:
        return said, str(error)
    return said, None


def test_waits_for_room_and_says_once_what_it_waits_for(crowded):
    (line,), error = wait(crowded, 1800.0, servers_s=0.0, workers_s=1700.0)
    assert error is None
    assert crowded.now_s == 1700.0
    assert line.startswith(f"waiting for room (run.placement_timeout_s = 1800): {MISSING}")


@pytest.mark.parametrize(("timeout_s", "num_lines"), [(60.0, 1), (7.5, 1), (2.0, 0)])
@pytest.mark.parametrize("servers_s", [0.0, 1.0])
def test_gives_up_with_the_same_words(crowded, servers_s, timeout_s, num_lines):
    lines, error = wait(crowded, timeout_s, servers_s=servers_s, workers_s=math.inf)
    assert crowded.now_s == math.ceil(timeout_s)
    assert error.startswith(f"no room within run.placement_timeout_s = {timeout_s:g}: {MISSING}")
    assert len(lines) == num_lines
    assert all(error.partition(": ")[2] in line for line in lines)


def test_what_waits_together_is_counted_together(crowded):
    _, error = wait(crowded, 60.0, servers_s=math.inf, workers_s=math.inf)
    assert "the run needs 2 server (2 servers with 1 each), the cluster has 0 free" in error
    assert crowded.now_s == 60.0


def test_room_that_is_there_needs_no_words(crowded):
    assert wait(crowded, 60.0, servers_s=0.0, workers_s=0.0) == ([], None)


@pytest.mark.parametrize("is_spread", [False, True])
def test_what_only_ray_knows_is_said_to_be_the_placement(crowded, is_spread):
    groups = [Group(crowded, math.inf, 1)] + [Group(crowded, 0.0, 1)] * is_spread
    with pytest.raises(InputError, match="no node has room for every part with") as raised:
        reservation._wait_for_room(groups, [SERVER, WORKER], Plan(60.0), Controls())
    assert ("scaling.spread_servers = true: set that to false" in str(raised.value)) == is_spread


def test_a_run_that_is_told_to_stop_waits_no_longer(crowded):
    controls = Controls(waiting=lambda line: controls.stopping.set())
    groups = [Group(crowded, math.inf, len(WORKERS))]
    with pytest.raises(Stopped):
        reservation._wait_for_room(groups, WORKERS, Plan(1800.0), controls)
    assert crowded.now_s <= 2 * reservation.PLACE_POLL_S


def settings(**scaling):
    return TrainConfig.model_validate({**Plan(1.0).config.model_dump(), "scaling": scaling}).scaling


@pytest.mark.parametrize(
    ("scaling", "groups"),
    [
        ({"num_servers": 3}, [(3, "SPREAD"), (7, "PACK")]),
        ({"num_servers": 3, "placement_strategy": "SPREAD"}, [(3, "SPREAD"), (7, "SPREAD")]),
        ({"num_servers": 3, "spread_servers": False}, [(10, "PACK")]),
        ({"num_servers": 3, "placement_strategy": "STRICT_PACK"}, [(10, "STRICT_PACK")]),
        ({"num_servers": 1}, [(10, "PACK")]),
    ],
)
def test_servers_are_spread_apart_from_where_workers_are_packed(scaling, groups):
    assert reservation._strategies(settings(**scaling), 10) == groups


class PlacedGroup:
    """One that Ray has placed, on nodes of these names."""

    def __init__(self, *nodes):
        self.nodes, self.bundle_count = nodes, len(nodes)


def test_each_part_has_the_place_of_its_bundle(monkeypatch):
    for module in (cluster, worker_room):
        monkeypatch.setattr(
            module,
            "placement_group_table",
            lambda group: {"bundles_to_node_id": dict(enumerate(group.nodes))},
        )
    servers, others = PlacedGroup("a", "b"), PlacedGroup("e", "w0", "w1")
    bundles = [{"server": 1.0}] * 2 + [{"evaluator": 1.0}] + [{"worker": 1.0}] * 2
    workers = worker_room.SharedRoom(others, 2, bundles[-1])
    room = cluster.Room([servers, others], bundles, 2, None, {"worker": 1.0}, workers)
    assert room.worker_nodes() == {0: "w0", 1: "w1"}
    options = [room.for_server(0), room.for_server(1), room.for_evaluator(), room.for_worker(1)]
    places = [each["scheduling_strategy"] for each in options]
    assert [each.placement_group for each in places] == [servers, servers, others, others]
    assert [each.placement_group_bundle_index for each in places] == [0, 1, 0, 2]
    assert [set(each["resources"]) for each in options] == [
        {"server"},
        {"server"},
        {"evaluator"},
        {"worker"},
    ]
