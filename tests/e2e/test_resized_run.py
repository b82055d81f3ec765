"""A run that is given more servers, and then fewer, while it goes on."""

import pytest
from conftest import BATCH_SIZE
from counter_model import counting, hurry
from processes import EVENT_TIMEOUT_S, events, wait_for, wait_for_event
from safetensors.torch import load_file

from asynception.orders import Order
from asynception.scale import scale
from model.errors import InputError
from ps.checkpoint import read_metadata

pytestmark = pytest.mark.long

NUM_PUSHES = 1_500
STEP_S = 0.1
"""The run lasts for minutes, until it is told to hurry."""
SAMPLES = NUM_PUSHES * BATCH_SIZE
SETTINGS = {
    "training.samples": SAMPLES,
    "checkpoint.num_to_keep": 3,
    "scaling.num_servers": 1,
    "scaling.num_workers": "1,2",
    "scaling.resources_per_worker.CPU": 0.5,
}


def change(run, number):
    """Other servers; what was answered, once there are so many, and workers train with them."""
    answer = scale(str(run.path), None, Order(num_servers=number))
    wait_for_event(run, f"to {number} servers")
    servers = wait_for(
        lambda: len(found := run.titled("ray::ServerProcess")) == number and found,
        EVENT_TIMEOUT_S,
        f"{number} servers",
    )
    assert len(servers) == number
    before = run.metrics("train")[-1]["samples"]
    run.wait_for_samples(before + 2 * BATCH_SIZE)
    return answer


def refused(run, number):
    with pytest.raises(InputError) as error:
        scale(str(run.path), None, Order(num_servers=number))
    return str(error.value)


@pytest.fixture(scope="module")
def resized(join_module, tmp_path_factory):
    """The run at its end, and what was answered to each order."""
    folder = tmp_path_factory.mktemp("counter")
    run, answers = join_module(counting(folder, STEP_S) | SETTINGS), {}
    run.wait_for_workers(2, 2)
    scale(str(run.path), None, Order(num_workers=1))
    run.wait_for_workers(1, 1)
    answers["up"] = change(run, 3)
    answers["again"], answers["too many"] = refused(run, 3), refused(run, 10_000)
    answers["down"] = change(run, 2)
    hurry(folder)
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    return run, answers


def test_an_order_is_carried_out_or_refused(resized):
    run, answers = resized
    assert answers["up"].startswith("1 servers, to be 3: a checkpoint is written")
    assert answers["down"].startswith("3 servers, to be 2: a checkpoint is written")
    assert "the run has so many" in answers["again"]
    assert "this model can be cut into 1 to 512 shards" in answers["too many"]
    scaled = [event for event in events(run) if event.startswith("scaled from")]
    assert scaled == [
        "scaled from 2 to 1 workers",
        "scaled from 1 to 3 servers",
        "scaled from 3 to 2 servers",
    ]


def test_it_is_no_failure_and_as_many_workers_go_on(resized):
    run, _ = resized
    result = run.result()
    assert (result["status"], result["samples"]) == ("finished", SAMPLES)
    assert (result["restarts"], result["worker_failures"], result["updates_lost"]) == (0, 0, {})
    last = run.metrics("train")[-1]
    assert last["workers_wanted"] == 1


def test_every_batch_is_in_the_parameters_once_whoever_served_them(resized):
    run, _ = resized
    result = run.result()
    *changes, last = (run.path / "checkpoints" / name for name in run.checkpoints())
    counts = load_file(last / "model.safetensors")["weight"].unique().tolist()
    assert min(counts) == NUM_PUSHES
    # Where shards were cut at different versions, what one has twice is declared.
    twice = result["data"]["samples_twice"]
    assert (max(counts) - NUM_PUSHES) * BATCH_SIZE <= twice
    assert len(changes) == 2
    if twice == 0:
        first, second = (read_metadata(path)["updates"] for path in changes)
        applied = first + 3 * (second - first) + 2 * (NUM_PUSHES - second)
        assert result["receipts"] == {"applied": applied}
