"""A detached run for which Ray's autoscaler brings nodes, one of which is drained, and takes them.

The nodes are raylets on this machine, the autoscaler is Ray's own.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import BATCH_SIZE
from counter_model import counting, hurry
from processes import (
    PROGRAM,
    RUN_TIMEOUT_S,
    Command,
    TrainRun,
    events,
    only,
    wait_for,
    wait_for_event,
)
from safetensors.torch import load_file

from ps.checkpoint import read_metadata

pytest.importorskip("ray.autoscaler._private.fake_multi_node.node_provider")
from autoscaling import AutoscaledRay

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),  # the first test waits for all that happens to the run
]

MAX_WORKERS = 3
NUM_PUSHES = 1200
STEP_S = 1.0
SETTINGS = {
    "training.samples": NUM_PUSHES * BATCH_SIZE,
    # The run takes its time until all has happened.
    "scaling.num_workers": f"1,{MAX_WORKERS}",
    "run.detached": "true",
    "run.placement_timeout_s": 200,
}


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="as-"))  # Ray's sockets need a short path
    ray = AutoscaledRay(folder, MAX_WORKERS)
    yield ray
    ray.end()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run(cluster, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoscaled")
    settings = counting(folder, STEP_S) | SETTINGS | {"ray.address": cluster.address}
    run = TrainRun(folder, recipe, settings, env=cluster.membership)
    yield run
    run.kill_all()


def nodes_are(cluster: AutoscaledRay, number: int) -> dict[int, str]:
    wait_for(lambda: len(cluster.nodes()) == number, RUN_TIMEOUT_S, f"{number} nodes")
    return cluster.nodes()


@pytest.fixture(scope="module")
def scaled(cluster, run):
    """The run at its end, and what was answered to each order."""
    answers = {}

    def scale(num_workers: int, where: str = "RUN") -> str:
        command = (*PROGRAM, "scale", where, f"--num-workers={num_workers}")
        address = f"--ray.address={cluster.address}"
        told = Command(run.folder / "scale", *command, address, env=cluster.membership).wait()
        return told.stdout if told.code == 0 else told.stderr

    assert not cluster.nodes()
    run.wait_for_workers(MAX_WORKERS, MAX_WORKERS)
    answers["brought"] = nodes_are(cluster, MAX_WORKERS)
    answers["down"] = scale(1)
    answers["left"] = nodes_are(cluster, 1)
    answers["too many"] = scale(MAX_WORKERS + 1, str(run.path))
    (node,) = answers["left"].values()
    cluster.drain(node)
    wait_for_event(run, "its node is being drained")
    wait_for_event(run, "worker 0 began: 1 of 1 workers")
    answers["after"] = cluster.nodes()[only(cluster, "ray::WorkerProcess").ppid()]
    hurry(run.folder)
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    return run, answers


def test_the_autoscaler_brings_nodes_for_workers_that_lack_room(scaled):
    run, answers = scaled
    assert len(answers["brought"]) == MAX_WORKERS
    began = [event for event in events(run) if "began: " in event]
    assert began[-1] == "worker 0 began: 1 of 1 workers"
    assert answers["after"] not in answers["brought"].values(), "on a node that came for it"


def test_a_detached_run_takes_orders_by_its_name_and_by_its_folder(scaled):
    run, answers = scaled
    assert answers["down"].startswith("1 of 1 workers")
    assert f"{MAX_WORKERS} at most" in answers["too many"]
    left = [event for event in events(run) if "left after" in event]
    assert sum("the run was scaled to 1 workers" in event for event in left) == 2
    assert sum("its node is being drained" in event for event in left) == 1
    assert run.result()["worker_failures"] == run.result()["restarts"] == 0


def test_nodes_without_a_worker_are_taken_away(scaled, cluster):
    _, answers = scaled
    assert set(answers["left"].values()) < set(answers["brought"].values())
    nodes_are(cluster, 0)


def test_every_push_is_in_the_parameters_once(scaled):
    run, _ = scaled
    result = run.result()
    assert (result["status"], result["updates"]) == ("finished", NUM_PUSHES)
    assert result["receipts"] == {"applied": 2 * NUM_PUSHES}
    assert (result["samples"], result["data"]["samples_twice"]) == (NUM_PUSHES * BATCH_SIZE, 0)
    last = run.path / "checkpoints" / run.checkpoints()[-1]
    assert read_metadata(last)["updates"] == NUM_PUSHES
    assert load_file(last / "model.safetensors")["weight"].unique().tolist() == [NUM_PUSHES]
