"""Runs one after another: what is gone on with, what is begun anew, and what is refused."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from asynception.compare import running
from asynception.compare.attempts import Attempt, output_path
from asynception.compare.grid import plan_runs
from asynception.compare.options import Conditions
from asynception.compare.reading import read_planned
from asynception.recipe import load_config, save_config
from asynception.run_folder import folder_of
from model.errors import InputError

DEADLINE_S = 30.0
RECIPE = '[data]\ntrain = "t"\nval = "v"\n[training]\nepochs = 3\n'


class Training:
    """Stands in for the command: notes what it was called with and leaves what a run leaves."""

    def __init__(self):
        self.started = []
        self.fails = set()
        self.dies = set()

    def __call__(self, command, output):
        config = load_config(output.parent.parent / command[-1])
        name, folder = config.run.name, folder_of(config)
        self.started.append(name)
        if name in self.dies:
            output.write_text("Traceback\nerror: out of luck\n")
            return 2
        folder.mkdir(parents=True)
        save_config(config, folder)
        failed = name in self.fails
        status = {"status": "failed" if failed else "finished", "eval": {"map@100": 0.5}}
        status |= {"error": "it diverged" if failed else None}
        (folder / "result.json").write_text(json.dumps(status))
        output.write_text("done\n")
        return int(failed)


@pytest.fixture
def training(monkeypatch):
    training = Training()
    monkeypatch.setattr(running, "run_command", training)
    return training


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def plan(out, *overrides):
    recipe = out.parent / "recipe.toml"
    recipe.write_text(RECIPE)
    return plan_runs(recipe, ["async", "sync"], Conditions(2), overrides, out)


NAMES = ["async-seed0", "sync-seed0", "async-seed1", "sync-seed1"]


def test_finished_runs_are_not_run_again(training, out):
    said = []
    running.run_all(plan(out), out, said.append)
    assert training.started == NAMES
    running.run_all(plan(out), out, said.append)
    assert training.started == NAMES
    assert sum("is there already" in line for line in said) == 4


def test_a_failed_run_leaves_its_error_and_the_rest_go_on(training, out):
    training.fails, training.dies = {"sync-seed0"}, {"async-seed1"}
    planned = plan(out)
    running.run_all(planned, out, str)
    assert training.started == NAMES
    records = [read_planned(run) for run in planned]
    assert [record.finished for record in records] == [True, False, False, True]
    assert [record.error for record in records] == [None, "it diverged", "out of luck", None]
    assert Attempt.read(out, "async-seed1").exit_code == 2


def test_a_failed_run_is_begun_anew_and_the_failed_one_set_aside(training, out):
    training.fails = {"sync-seed0"}
    running.run_all(plan(out), out, str)
    training.fails = set()
    running.run_all(plan(out), out, str)
    assert training.started == [*NAMES, "sync-seed0"]
    aside = out / "set-aside" / "sync-seed0-1" / "result.json"
    assert json.loads(aside.read_text())["error"] == "it diverged"
    assert all(read_planned(run).finished for run in plan(out))


def test_runs_of_other_settings_are_refused_before_anything_starts(training, out):
    running.run_all(plan(out)[:1], out, str)
    with pytest.raises(InputError, match=r"data\.batch_size.*another --out"):
        running.run_all(plan(out, "--data.batch_size", "8"), out, str)
    assert training.started == NAMES[:1]


def test_a_moved_comparison_is_gone_on_with(training, out):
    running.run_all(plan(out), out, str)
    moved = out.rename(out.with_name("moved"))
    running.run_all(plan(moved), moved, str)
    assert training.started == NAMES


def test_two_comparisons_do_not_work_in_one_folder(training, out):
    with running._taken(out), pytest.raises(InputError, match="at work there"):
        running.run_all(plan(out), out, str)


def test_a_folder_that_cannot_be_made_is_refused(training, out):
    out.write_text("a file")
    with pytest.raises(InputError, match="--out"):
        running.run_all(plan(out), out, str)


def test_what_a_command_says_is_kept_with_its_exit_code(tmp_path):
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert running.run_command([sys.executable, "-c", program], tmp_path / "said.txt") == 3
    assert sorted((tmp_path / "said.txt").read_text().split()) == ["err", "out"]


def test_a_killed_command_is_named_by_its_signal(out):
    (out / "attempts").mkdir(parents=True)
    run = plan(out)[0]
    output_path(out, run.name).write_text("nothing of note\n")
    assert "SIGKILL" in running._error(run, -signal.SIGKILL, output_path(out, run.name))


def test_an_interruption_ends_the_command_and_waits_for_it(tmp_path):
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('cleaned up', flush=True), sys.exit(0)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    said = tmp_path / "said.txt"

    def interrupt():
        deadline_s = time.monotonic() + DEADLINE_S
        while not (said.exists() and "ready" in said.read_text()):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        running.run_command([sys.executable, "-c", program], said)
    thread.join()
    assert said.read_text().split("\n")[1] == "cleaned up"
