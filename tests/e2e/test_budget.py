"""A run whose time is over ends as one does after its last sample, and can be gone on with."""

import pytest
from conftest import BATCH_SIZE, SAMPLES

pytestmark = pytest.mark.long

LONG = 100 * SAMPLES


def test_time_ends_a_run_cleanly_and_more_time_goes_on_with_it(join):
    run = join({"training.samples": LONG, "training.max_s": 1})
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    first = run.result()
    assert first["status"] == "finished"
    assert 0 < first["samples"] < LONG
    assert first["samples"] % BATCH_SIZE == 0
    assert run.metrics("eval")[-1]["samples"] == first["samples"]
    assert first["data"]["samples_returned"] == 0, "what was never handed out is not returned"
    settings = {"training.samples": first["samples"] + 10 * BATCH_SIZE, "training.max_s": "none"}
    outcome = join(settings, resume=True).wait()
    assert outcome.code == 0, str(outcome)
    assert run.result()["samples"] == first["samples"] + 10 * BATCH_SIZE
