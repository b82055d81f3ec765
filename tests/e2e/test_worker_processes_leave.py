"""Workers of two processes leave a run that goes on, and one of their processes is ended."""

import pytest
from conftest import BATCH_SIZE
from counter_model import counting, hurry
from processes import events, only, wait_for, wait_for_event
from safetensors.torch import load_file

from asynception.orders import Order
from asynception.scale import scale

pytestmark = pytest.mark.long

SAMPLES = 1000 * BATCH_SIZE
STEP_S = 1.0
DEADLINE_S = 120.0
SETTINGS = {
    "training.samples": SAMPLES,
    "scaling.num_workers": "1,2",
    "scaling.processes_per_worker": 2,
    "scaling.num_servers": 1,
    "scaling.resources_per_worker.CPU": 0.5,
}


def died(run):
    return [event for event in events(run) if "died after" in event]


def wait_until_full(run, times):
    """Until, for this time, both workers are there."""

    def full():
        return sum("began: 2 of 2 workers" in event for event in events(run)) == times

    wait_for(full, DEADLINE_S, "two workers")


def followers(run, before=None):
    """Rank 1 of both workers, the older one first, once another is there than before."""

    def both():
        found = run.titled("ray::NodeWorkerProcess.follow")
        return found if len(found) == 2 and found != before else None

    return wait_for(both, DEADLINE_S, "second processes of two workers")


@pytest.fixture(scope="module")
def run(join_module, tmp_path_factory):
    """At its end."""
    folder = tmp_path_factory.mktemp("counter")
    run = join_module(counting(folder, STEP_S) | SETTINGS)
    run.wait_for_workers(2, 2)
    at_first = followers(run)
    only(run, "ray::NodeWorkerProcess.lead").terminate()
    wait_for_event(run, "it got SIGTERM")
    wait_until_full(run, times=2)
    # Of the worker that stayed: the other one's has just ended, or has just begun.
    followers(run, at_first)[0].terminate()
    wait_for(lambda: died(run), DEADLINE_S, "death of a worker")
    wait_until_full(run, times=3)
    assert scale(str(run.path), None, Order(num_workers=1)).startswith("1 of 1 workers")
    run.wait_for_workers(1, 1)
    hurry(folder)
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    return run


def test_a_worker_leaves_when_its_first_process_gets_sigterm_and_when_it_is_scaled_away(run):
    left = [event for event in events(run) if "left after" in event]
    assert sum("it got SIGTERM" in event for event in left) == 1
    assert sum("the run was scaled to 1 workers" in event for event in left) == 1


def test_sigterm_to_another_process_is_the_death_of_its_worker(run):
    assert len(died(run)) == run.result()["worker_failures"] == 1
    assert run.result()["restarts"] == 0


def test_every_push_is_in_the_parameters_once_and_every_image_trained_on_once(run):
    result = run.result()
    assert (result["status"], result["samples"]) == ("finished", SAMPLES)
    assert result["receipts"] == {"applied": result["updates"]}
    assert result["data"]["samples_twice"] == 0
    last = run.path / "checkpoints" / run.checkpoints()[-1]
    assert load_file(last / "model.safetensors")["weight"].unique().tolist() == [result["updates"]]
