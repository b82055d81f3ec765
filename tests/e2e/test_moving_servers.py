"""A node that has one of two servers is drained and then killed: the server has left it by then."""

import contextlib
import os
import subprocess
import sys

import psutil
import pytest
from clusters import MEMBERSHIP, TWO_NODES, Cluster, JoinedRun
from conftest import BATCH_SIZE
from counter_model import counting, hurry, take_time
from processes import EVENT_TIMEOUT_S, events, title_of, wait_for, wait_for_event
from safetensors.torch import load_file

from ps.checkpoint import read_metadata

pytestmark = pytest.mark.long

NUM_PUSHES = 12_000
"""Many more than are made at full speed while a server that has a process gets ready."""
SAMPLES = NUM_PUSHES * BATCH_SIZE
STEP_S = 1.0
MOVED = "moved to another node at version"
SETTINGS = {
    "training.samples": SAMPLES,
    "scaling.num_servers": 2,
    "scaling.resources_per_server.server": 1,
    "scaling.resources_per_worker.worker": 1,
}


class TwoNodes(Cluster):
    """The second of which may be drained, and killed."""

    def __init__(self, folder):
        super().__init__(folder, TWO_NODES)
        self._address = self.address
        node, raylet = (folder / "other").read_text().split()
        self._node, self._raylet = node, psutil.Process(int(raylet))

    def drain(self):
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        command += [f"--address={self._address}", f"--node-id={self._node}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=it is sold"]
        command += ["--deadline-remaining-seconds=600"]
        env = {**os.environ, **MEMBERSHIP}
        subprocess.run(command, env=env, check=True, timeout=EVENT_TIMEOUT_S, capture_output=True)

    def servers_there(self):
        """Servers on the second node."""
        children = self._raylet.children(recursive=True)
        return [each for each in children if "ServerProcess" in title_of(each)]

    def kill(self):
        """The second node, at once."""
        for each in [self._raylet, *self._raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    cluster = TwoNodes(tmp_path_factory.mktemp("two-nodes"))
    yield cluster
    cluster.end()


def wait_for_third_server(run):
    """Until it has a process, if it isn't in the other one's place already."""

    def there():
        told = any(MOVED in event for event in events(run))
        return told or len(run.titled("ray::ServerProcess")) > 2

    wait_for(there, EVENT_TIMEOUT_S, "third server")


@pytest.fixture(scope="module")
def moved(two_nodes, recipe, tmp_path_factory):
    """A run that lost a node after its notice: it took its time until a server started elsewhere,
    and was at full speed when that one took over."""
    folder = tmp_path_factory.mktemp("counter")
    hurry(folder)
    settings = counting(folder, STEP_S) | SETTINGS
    run = JoinedRun(two_nodes, tmp_path_factory.mktemp("moved"), recipe, settings)
    try:
        run.wait_for_samples(SAMPLES // 100)
        assert len(two_nodes.servers_there()) == 1
        take_time(folder)
        two_nodes.drain()
        wait_for_third_server(run)
        hurry(folder)
        wait_for_event(run, MOVED)
        two_nodes.kill()
        outcome = run.wait()
        assert outcome.code == 0, str(outcome)
    finally:
        run.kill_all()
    two_nodes.wait_until_idle()
    return run


def test_it_is_no_failure(moved):
    result = moved.result()
    assert (result["status"], result["samples"]) == ("finished", SAMPLES)
    assert (result["server_moves"], result["restarts"], result["worker_failures"]) == (1, 0, 0)
    (said,) = (event for event in events(moved) if "moved to another node" in event)
    assert said.startswith("server ")
    assert said.endswith(": its node is being drained")


def test_every_batch_is_applied_once_at_both_shards(moved):
    result = moved.result()
    assert result["updates"] == NUM_PUSHES
    assert result["receipts"] == {"applied": 2 * NUM_PUSHES}
    assert (result["updates_lost"], result["data"]["samples_twice"]) == ({}, 0)
    last = moved.path / "checkpoints" / moved.checkpoints()[-1]
    assert read_metadata(last)["updates"] == NUM_PUSHES
    assert load_file(last / "model.safetensors")["weight"].unique().tolist() == [NUM_PUSHES]
