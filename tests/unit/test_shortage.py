"""What a run that doesn't fit on its cluster is told, and how long it waits for room."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynception import cluster
from asynception.config import TrainConfig
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


class Group:
    """A placement group that has its room after so many seconds."""

    def __init__(self, ready_after_s):
        self.ready_after_s, self.waited_s = ready_after_s, 0.0

    def wait(self, timeout_s):
        self.waited_s += min(timeout_s, self.ready_after_s - self.waited_s)
        return self.waited_s == self.ready_after_s


@pytest.fixture
def crowded(monkeypatch):
    """A cluster of which others hold all but five GPUs."""
    node = {"Alive": True, "Resources": NODE}
    dead = {"Alive": False, "Resources": {"GPU": 100.0}}
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [node, dead, node])
    monkeypatch.setattr(cluster.ray, "available_resources", lambda: {**NODE, "GPU": 5.0})


MISSING = "the run needs 8 GPU (8 workers with 1 each), the cluster has 5 free of 8"


@pytest.mark.usefixtures("crowded")
def test_waits_for_room_and_says_once_what_it_waits_for(caplog):
    group = Group(ready_after_s=1000.0)
    cluster._wait_for_room(group, [WORKER] * 8, Plan(1800.0))
    assert group.waited_s == 1000.0
    (line,) = caplog.messages
    assert line.startswith(f"waiting for room (run.placement_timeout_s = 1800): {MISSING}")


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize(("timeout_s", "lines"), [(60.0, 1), (2.0, 0)])
def test_gives_up_with_the_same_words(caplog, timeout_s, lines):
    group = Group(ready_after_s=math.inf)
    with pytest.raises(InputError) as raised:
        cluster._wait_for_room(group, [WORKER] * 8, Plan(timeout_s))
    assert group.waited_s == timeout_s
    limit = f"run.placement_timeout_s = {timeout_s:g}"
    assert str(raised.value).startswith(f"no room within {limit}: {MISSING}")
    assert len(caplog.messages) == lines
    assert all(str(raised.value).partition(": ")[2] in line for line in caplog.messages)


@pytest.mark.usefixtures("crowded")
def test_room_that_is_there_needs_no_words(caplog):
    cluster._wait_for_room(Group(ready_after_s=0.0), [WORKER] * 8, Plan(60.0))
    assert not caplog.messages


@pytest.mark.usefixtures("crowded")
def test_what_only_ray_knows_is_said_to_be_the_placement(caplog):
    with pytest.raises(InputError, match="no node has room for every part with"):
        cluster._wait_for_room(Group(ready_after_s=math.inf), [SERVER], Plan(60.0))
