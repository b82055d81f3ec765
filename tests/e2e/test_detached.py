"""Drivers that die while their run is on a cluster that stays: with them, or detached."""

import secrets
import signal
import sys
from pathlib import Path

import psutil
import pytest
from conftest import BATCH_SIZE, SAMPLES
from counter_model import counting, hurry
from processes import (
    PROGRAM,
    RUN_TIMEOUT_S,
    Command,
    TrainRun,
    events,
    strict_json,
    wait_for,
    wait_for_event,
)

from ps.checkpoint import read_metadata

HOLDING = """
import os, time
from pathlib import Path

tests = os.getppid()
import ray

ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
Path("starting").write_text(ray.get_runtime_context().gcs_address)
Path("starting").rename("address")
while not Path("done").exists() and os.getppid() == tests:
    Path("free").write_text(str(ray.available_resources().get("CPU", 0)))
    time.sleep(0.1)
ray.shutdown()
"""
"""A cluster for others, which says how many CPUs nobody has reserved, until the tests end."""

MEMBERSHIP = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
pytestmark = [
    pytest.mark.long,
    pytest.mark.alone,  # for what it finds in shared memory
]

SHARED_MEMORY = Path("/dev/shm")
STEP_S = 0.25
"""The run takes its time until it is to reach its end: several programs start meanwhile."""
CHECKPOINT_EVERY_EPOCHS = 0.2
DEADLINE_S = 60.0
PARTS = ("ray::DriverProcess", "ray::ServerProcess", "ray::WorkerProcess", "ray::EvaluatorProcess")
PARTS += ("ray::JournaledCoordinator",)


class Cluster(Command):
    """Ray, of which runs are members."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sys.executable, "-c", HOLDING, env=MEMBERSHIP)
        wait_for((folder / "address").exists, RUN_TIMEOUT_S, "Ray")
        self.address = (folder / "address").read_text()

    def parts(self) -> list[psutil.Process]:
        """Processes of runs."""
        return [process for title in PARTS for process in self.titled(title)]

    def wait_until_free(self) -> None:
        """Until no run has a process or a reserved CPU."""
        wait_for(lambda: not self.parts(), DEADLINE_S, "end of the run's processes")
        wait_for(lambda: (self.folder / "free").read_text() == "2.0", DEADLINE_S, "free CPUs")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    (cluster.folder / "done").touch()
    cluster.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of the run's model."""
    return tmp_path_factory.mktemp("counter")


@pytest.fixture(scope="module")
def start(cluster, recipe, model):
    """Starts the run, or goes on with it."""

    def start(folder: Path, *, resume: bool = False, **settings: object) -> TrainRun:
        given = {
            **counting(model, STEP_S),
            "scaling.num_workers": 1,
            "scaling.num_servers": 1,
            "checkpoint.every_epochs": CHECKPOINT_EVERY_EPOCHS,
            "ray.address": cluster.address,
            **settings,
        }
        return TrainRun(folder, recipe, given, resume=resume, env=MEMBERSHIP)

    return start


def ask(cluster: Cluster, run: TrainRun, folder: Path, command: str, *options: str) -> Command:
    return Command(folder, *PROGRAM, command, str(run.path), *options, env=MEMBERSHIP)


def checkpoint_beyond(run: TrainRun, num: int) -> None:
    wait_for(lambda: len(run.checkpoints()) > num, RUN_TIMEOUT_S, "checkpoint")


@pytest.fixture(scope="module")
def orphaned(cluster, start, tmp_path_factory):
    """A run whose driver, a member of the cluster, was killed; and what it had been."""
    before = set(SHARED_MEMORY.iterdir())
    run = start(tmp_path_factory.mktemp("orphaned"))
    checkpoint_beyond(run, 0)
    run.process.kill()
    run.wait()
    cluster.wait_until_free()
    return run, set(SHARED_MEMORY.iterdir()) - before


def test_all_parts_of_a_run_end_with_its_driver(orphaned):
    run, shared_memory = orphaned
    assert run.output.code == -signal.SIGKILL
    assert not (run.path / "result.json").exists()
    assert not shared_memory


@pytest.fixture(scope="module")
def detached(cluster, start, orphaned, tmp_path_factory):
    """It goes on detached. Who started it is killed, then its driver; then it is stopped."""
    killed, _ = orphaned
    folder = tmp_path_factory.mktemp("detached")
    num = len(killed.checkpoints())
    place = {"run.storage_path": killed.path.parent, "run.detached": "true"}
    place["checkpoint.num_to_keep"] = "none"
    starter = start(folder / "starter", resume=True, **place)
    checkpoint_beyond(killed, num)
    starter.process.kill()
    starter.wait()
    again = start(folder / "again", resume=True, **place)
    num = len(killed.checkpoints())
    checkpoint_beyond(killed, num)
    (driver,) = cluster.titled("ray::DriverProcess")
    driver.kill()
    attached = ask(cluster, killed, folder / "attached", "attach")
    wait_for_event(killed, "the driver died")
    num = len(killed.checkpoints())
    checkpoint_beyond(killed, num)
    wait_for(lambda: "checkpoint" in attached.output.stdout, DEADLINE_S, "lines")
    attached.signal_group(signal.SIGINT)
    ended = {"starter": starter, "again": again, "attached": attached}
    outcomes = {name: command.wait() for name, command in ended.items()}
    samples = killed.metrics("train")[-1]["samples"]
    outcomes["stop"] = ask(cluster, killed, folder / "stop", "stop").wait()
    cluster.wait_until_free()
    return killed, outcomes, samples


def test_a_detached_run_outlives_who_started_it_and_then_its_driver(detached):
    run, outcomes, _ = detached
    assert outcomes["starter"].code == -signal.SIGKILL
    (event,) = (event for event in events(run) if "the driver died" in event)
    assert 0 < int(event.rpartition("starting again from ")[2].split()[0]) < SAMPLES


def test_two_runs_of_one_name_cannot_go_on_at_once(detached):
    again = detached[1]["again"]
    assert again.code == 2
    assert "run.name = RUN goes on" in again.stderr
    assert len(again.stderr.splitlines()) == 1


def test_ctrl_c_leaves_a_run_that_is_shown(detached):
    attached = detached[1]["attached"]
    assert attached.code == 130
    assert "samples/s" in attached.stdout
    assert "asynception stop RUN" in attached.stderr
    assert len(attached.stderr.splitlines()) == 1


def test_a_stopped_run_has_saved_all_that_it_had_done(detached):
    run, outcomes, samples = detached
    assert outcomes["stop"].code == 0, outcomes["stop"]
    result = run.result()
    assert (result["status"], result["restarts"]) == ("interrupted", 1)
    last = run.path / "checkpoints" / run.checkpoints()[-1]
    assert result["checkpoint"] == str(last)
    assert samples <= read_metadata(last)["samples"] == result["samples"] < SAMPLES


def test_a_stopped_run_goes_on_detached_to_its_end(cluster, start, model, detached, tmp_path):
    """And whoever attaches then is told how it ended."""
    run = detached[0]
    hurry(model)
    place = {"run.storage_path": run.path.parent, "run.detached": "true"}
    outcome = start(tmp_path, resume=True, **place).wait()
    assert outcome.code == 0, str(outcome)
    result = run.result()
    assert strict_json(outcome.stdout[outcome.stdout.index("\n{\n") :]) == result
    assert result["status"] == "finished"
    assert (result["samples"], result["updates"]) == (SAMPLES, SAMPLES // BATCH_SIZE)
    assert result["receipts"] == {"applied": SAMPLES // BATCH_SIZE}
    cluster.wait_until_free()
    told = ask(cluster, run, tmp_path / "attached", "attach").wait()
    assert (told.code, strict_json(told.stdout)) == (0, result)
