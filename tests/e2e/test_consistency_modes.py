"""Options of [consistency] in whole runs, with a death where someone could wait for the dead."""

import pytest
from conftest import BATCH_SIZE
from processes import only, wait_for_event

pytestmark = pytest.mark.long

SAMPLES, NUM_SERVERS = 64 * BATCH_SIZE, 2
BOUNDED = {"consistency.mode": "bounded", "consistency.slack": 0, "scaling.num_workers": 2}


def test_a_bounded_run_goes_on_without_its_dead_and_with_their_successors(join):
    run = join(BOUNDED | {"training.samples": 8 * SAMPLES})
    run.wait_for_samples(SAMPLES)
    only(run, "ray::WorkerProcess").kill()
    wait_for_event(run, "died after")
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert (result["status"], result["samples"]) == ("finished", 8 * SAMPLES)
    assert result["worker_failures"] == 1
    assert set(result["receipts"]) == {"applied"}, "nothing was lost"


@pytest.mark.parametrize(
    "options",
    [
        {
            "consistency.delay_compensation": 0.04,
            "consistency.staleness_lr": "true",
            "consistency.ramp_up_epochs": 1.0,
        },
        {
            "consistency.mode": "averaging",
            "consistency.asynchronous": "true",
            "consistency.local_steps": 2,
            "consistency.outer_momentum": 0.5,
        },
        {"consistency.mode": "elastic", "consistency.local_steps": 3},
    ],
    ids=lambda options: next(reversed(options)).removeprefix("consistency."),
)
def test_options_train_on_all_samples(join, options):
    run = join(options | {"training.samples": SAMPLES})
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert (result["status"], result["samples"]) == ("finished", SAMPLES)
    assert set(result["receipts"]) <= {"applied", "accumulated"}
