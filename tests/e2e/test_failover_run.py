"""Servers and standbys are killed with SIGKILL while a run trains: nothing is lost or doubled."""

import pytest
from conftest import BATCH_SIZE
from counter_model import counting, hurry, take_time
from processes import events, wait_for_event
from safetensors.torch import load_file

from ps.checkpoint import read_metadata

NUM_PUSHES = 6000
SAMPLES = NUM_PUSHES * BATCH_SIZE
A_WHILE = SAMPLES // 30
STEP_S = 1.0


def servers(run):
    """Servers and standbys that live, the oldest first."""
    return sorted(run.titled("ray::ServerProcess"), key=lambda process: process.create_time())


@pytest.fixture(scope="module")
def survivor(join_module, tmp_path_factory):
    """A run that lost its server, and then the standby that had been made since.

    Both while it trains at full speed; it takes its time only while that standby starts."""
    folder = tmp_path_factory.mktemp("counter")
    hurry(folder)
    settings = {"training.samples": SAMPLES, "scaling.num_servers": 1, "scaling.replicas": 1}
    run = join_module(counting(folder, STEP_S) | settings)
    run.wait_for_samples(A_WHILE)
    servers(run)[0].kill()
    take_time(folder)
    wait_for_event(run, "its standby goes on at version")
    wait_for_event(run, "server 0 has a standby again")
    hurry(folder)
    run.wait_for_samples(run.metrics("train")[-1]["samples"] + A_WHILE)
    servers(run)[1].kill()
    wait_for_event(run, "another one is made")
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    return run


def test_a_run_that_loses_a_server_and_a_standby_starts_nothing_again(survivor):
    result = survivor.result()
    assert (result["status"], result["samples"]) == ("finished", SAMPLES)
    assert result["restarts"] == result["worker_failures"] == 0
    promotions = [event for event in events(survivor) if "its standby goes on" in event]
    assert len(promotions) == 1
    assert any("on the nodes of their servers" in event for event in events(survivor))


def test_every_push_is_in_the_parameters_once(survivor):
    result = survivor.result()
    assert result["updates"] == NUM_PUSHES
    assert result["receipts"] == {"applied": NUM_PUSHES}
    assert (result["updates_lost"], result["data"]["samples_twice"]) == ({}, 0)
    last = survivor.path / "checkpoints" / survivor.checkpoints()[-1]
    assert read_metadata(last)["updates"] == NUM_PUSHES
    assert load_file(last / "model.safetensors")["weight"].unique().tolist() == [NUM_PUSHES]
