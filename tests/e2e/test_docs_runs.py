"""Commands that README and docs show and that train: each is run, on little, in one Ray."""

import re
import signal

import pytest
import ray
from documented import CLUSTER, COMPARISONS, DOCTOR, ONE_RUN, SETTINGS
from processes import PROGRAM, RUN_TIMEOUT_S, Command, read_result, wait_for
from stage import Stage

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),  # some run a dozen commands, each of seconds
]

DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def address():
    """Of a Ray that this process has started, and which all runs join."""
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(autouse=True)
def _there(stage, monkeypatch):
    monkeypatch.chdir(stage.folder)


def test_a_run_is_made_and_used(stage, address):
    for trial in ONE_RUN:
        assert stage.run(trial), trial.text
    first = read_result(stage.folder / "runs" / "first")
    assert (first["status"], first["samples"]) == ("finished", 4 * 64)
    assert read_result(stage.folder / "runs" / "second")["status"] == "finished"


@pytest.mark.parametrize("trial", SETTINGS, ids=lambda trial: trial.text)
def test_a_run_with_other_settings(stage, address, trial):
    before = set(stage.folder.glob("runs/*"))
    said = stage.run(trial, address=address)
    (made,) = set(stage.folder.glob("runs/*")) - before
    assert read_result(made)["status"] == "finished"
    assert '"status": "finished"' in said


def test_modes_are_compared(stage, address):
    for trial in COMPARISONS:
        said = stage.run(trial, address=address)
    assert "async" in said
    assert (stage.folder / "runs" / "all" / "report.html").is_file()


def apart(stage, address, name, folder):
    """A command that goes on while others are run."""
    program, *words = CLUSTER[name].words(address=address)
    folder = stage.folder / folder
    assert program == "asynception"
    return Command(
        folder, "bash", "-c", 'cd "$1" && shift && exec "$@"', "-", stage.folder, *PROGRAM, *words
    )


def until_it_trains(stage, name, command):
    def trains():
        assert command.process.poll() is None, str(command.output)
        return re.search(r"\d+ samples/s|[\d,]+/[\d,]+ samples", command.output.stdout)

    wait_for(trains, RUN_TIMEOUT_S, f"samples of {name}")


def test_runs_on_a_cluster_are_watched_scaled_and_stopped(stage, address):
    started = apart(stage, address, "starts NAME", "starter")
    until_it_trains(stage, "NAME", started)
    attached = apart(stage, address, "attaches", "attached")
    until_it_trains(stage, "NAME", attached)
    attached.signal_group(signal.SIGINT)
    assert attached.wait(DEADLINE_S).code == 130
    assert "of 1 workers" in stage.run(CLUSTER["scales"])
    assert "1 servers, to be 2" in stage.run(CLUSTER["resizes"])
    metrics = stage.folder / "runs" / "NAME" / "metrics.jsonl"
    wait_for(lambda: "to 2 servers" in metrics.read_text(), RUN_TIMEOUT_S, "other servers")
    assert "running" in stage.run(CLUSTER["asks"])
    stage.run(CLUSTER["stops NAME"])
    assert read_result(stage.folder / "runs" / "NAME")["status"] == "interrupted"
    assert started.wait(DEADLINE_S).code != 0, "who shows a run is told how it ended"


def test_two_runs_on_one_cluster(stage, address):
    wide = apart(stage, address, "starts wide", "wide")
    narrow = apart(stage, address, "starts narrow", "narrow")
    assert narrow.wait().code == 0, str(narrow.output)
    until_it_trains(stage, "wide", wide)
    stage.run(CLUSTER["stops wide"], address=address)
    wide.wait(DEADLINE_S)
    assert "interrupted" in stage.run(CLUSTER["watches wide"])


@pytest.mark.parametrize("trial", DOCTOR, ids=lambda trial: trial.text)
def test_the_doctor_ends_with_a_verdict(stage, address, trial):
    said = stage.run(trial, address=address)
    assert re.search(r"\d+ checks: \d+ failed", said)
