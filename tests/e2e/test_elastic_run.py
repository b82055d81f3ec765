"""A run whose workers are scaled down and up while it goes on, one of which gets SIGTERM."""

import pytest
from conftest import BATCH_SIZE, SAMPLES
from counter_model import counting, hurry
from processes import EVENT_TIMEOUT_S, events, wait_for, wait_for_event

from asynception.orders import Order
from asynception.scale import scale
from model.errors import InputError
from ps.checkpoint import read_metadata

STEP_S = 0.5
SETTINGS = {
    "training.samples": SAMPLES,
    "scaling.num_workers": "1,2",
    "scaling.resources_per_worker.CPU": 0.5,
}


def who_stayed(run):
    """The one worker's process, once the other's has ended."""

    def alone():
        found = run.titled("ray::WorkerProcess")
        return found if len(found) == 1 else None

    (worker,) = wait_for(alone, EVENT_TIMEOUT_S, "end of all workers but one")
    return worker


@pytest.fixture(scope="module")
def scaled(join_module, tmp_path_factory):
    """The run at its end, and what was answered to each order."""
    folder, answers = tmp_path_factory.mktemp("counter"), {}
    run = join_module(counting(folder, STEP_S) | SETTINGS)
    run.wait_for_workers(2, 2)
    answers["down"] = scale(str(run.path), None, Order(num_workers=1))
    run.wait_for_workers(1, 1)
    who_stayed(run).terminate()
    wait_for_event(run, "it got SIGTERM")
    wait_for_event(run, "worker 0 began: 1 of 1 workers")
    for wrong in (0, 3):
        with pytest.raises(InputError) as refused:
            scale(str(run.path), None, Order(num_workers=wrong))
        answers[wrong] = str(refused.value)
    answers["up"] = scale(str(run.path), None, Order(num_workers=2))
    wait_for_event(run, "began: 2 of 2 workers")
    hurry(folder)
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    with pytest.raises(InputError) as refused:
        scale(str(run.path), None, Order(num_workers=2))
    answers["late"] = str(refused.value)
    return run, answers


def test_an_order_is_carried_out_or_refused(scaled):
    _, answers = scaled
    assert answers["down"].startswith("1 of 1 workers")
    # An order is answered after some seconds, whether the worker has been given its room or not.
    assert answers["up"].startswith(("2 of 2 workers", "1 of 2 workers; 1 begin once"))
    assert "nobody would train" in answers[0]
    assert "scaling.num_workers = [1, 2], 2 at most" in answers[3]
    assert "is finished" in answers["late"]


def test_who_leaves_is_no_failure_and_gives_back_what_it_has_not_done(scaled):
    run, _ = scaled
    left = [event for event in events(run) if "left after" in event]
    assert sum("the run was scaled to 1 workers" in event for event in left) == 1
    assert sum("it got SIGTERM" in event for event in left) == 1
    returned = sum(int(event.split(";")[1].split()[0]) for event in left)
    assert run.result()["worker_failures"] == run.result()["restarts"] == 0
    assert run.result()["data"]["samples_returned"] == returned > 0


def test_every_image_is_trained_on_once_for_all_that(scaled):
    run, _ = scaled
    result, updates = run.result(), SAMPLES // BATCH_SIZE
    assert result["status"] == "finished"
    assert (result["samples"], result["updates"]) == (SAMPLES, updates)
    assert result["receipts"] == {"applied": 2 * updates}
    assert result["data"]["samples_twice"] == 0
    last = run.path / "checkpoints" / run.checkpoints()[-1]
    assert read_metadata(last)["updates"] == updates
