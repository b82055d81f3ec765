"""The doctor's command on this machine without Ray, its time limits, and what it does to disks."""

import dataclasses
import json
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from doctor_verdicts import gravity
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asynception.doctor import node, report, storage
from asynception.doctor.command import doctor
from asynception.doctor.dataset import judge_dataset, measure_dataset
from asynception.doctor.examination import examine
from asynception.doctor.finding import Finding, ok
from asynception.doctor.needs import derive_needs, judge_needs
from asynception.doctor.storage import NUM_BYTES, Storage, judge_storage, measure_storage
from asynception.doctor.timed import Check, carry_out, threads_left
from asynception.plan import plan_run
from asynception.recipe import load_config
from asynception.reservation import _parts
from model.errors import InputError

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.toml"

PROGRAM = (sys.executable, "-c", "from asynception.doctor.command import doctor; doctor()")


@pytest.fixture(scope="module")
def config():
    return load_config(RECIPE, ["--data.num_classes", "200"])


def test_whatever_a_check_does_there_is_one_line_about_it():
    def broken():
        raise RuntimeError("the disk\nis on fire")

    def leaves():
        sys.exit("bye")

    def refuses():
        raise InputError("run.storage_path = x: mend it")

    for run, said in ((broken, "the disk"), (leaves, "bye"), (refuses, "run.storage_path = x")):
        finding = carry_out(Check("it", run), "there")
        assert (finding.check, finding.where, finding.level) == ("it", "there", "fail")
        assert said in finding.found
        assert "\n" not in finding.found
        assert finding.mend
    assert carry_out(Check("it", lambda: ok("fine"))) == Finding("it", "here", "ok", "fine", "")


def test_a_check_that_hangs_fails_and_is_counted():
    release = threading.Event()

    def hang():
        release.wait()
        return ok("late")

    finding = carry_out(Check("it", hang, limit_s=0.05, if_late="pull the plug"))
    assert (finding.level, finding.mend) == ("fail", "pull the plug")
    assert threads_left() == 1
    release.set()
    for thread in threading.enumerate():
        if thread.name == "check it":
            thread.join()
    assert threads_left() == 0


@pytest.mark.parametrize("recipe", [False, True])
def test_every_check_of_a_node_becomes_a_failure_if_it_raises(config, recipe, monkeypatch):
    needs = derive_needs(config) if recipe else None
    checks = node.node_checks(needs, node.Place())
    assert len({check.name for check in checks}) == len(checks) == 16 + recipe
    broken = [dataclasses.replace(check, run=lambda: 1 / 0) for check in checks]
    monkeypatch.setattr(node, "node_checks", lambda needs, place: broken)
    findings = list(node.examine(needs, node.Place()))
    assert [finding.level for finding in findings] == ["fail"] * len(checks)
    assert report.num_failed(findings) == len(checks)


def test_needs_are_those_of_the_run(config):
    needs, plan = derive_needs(config), plan_run(config)
    bundles = [part.resources for part in _parts(plan)]
    for name, amount in needs.resources.items():
        assert amount == sum(bundle.get(name, 0.0) for bundle in bundles)
    assert {name for bundle in bundles for name in bundle} == set(needs.resources)
    assert needs.pull_num_bytes == plan.model.pull_num_bytes
    assert needs.largest_num_bytes < needs.all_num_bytes
    assert gravity(judge_needs(needs)) == 0


@given(st.integers(0, 10**10), st.integers(0, 10**10), st.integers(1, 10**9), st.integers(1, 5))
def test_more_room_for_checkpoints_is_never_worse(free, more, size, keep):
    few, many = (
        judge_storage(Storage(room, 1.0, 1.0, True, True), size, keep)
        for room in (free, free + more)
    )
    assert gravity(few) >= gravity(many)
    assert (few.level == "fail") == (free < size * (keep + 1))


def test_disks_that_lie_fail():
    good = Storage(10**12, 1.0, 1.0, same=True, locks=True)
    assert judge_storage(good, 0, 2).level == "ok"
    for worse in ({"same": False}, {"locks": False}):
        assert gravity(judge_storage(dataclasses.replace(good, **worse), 0, 2)) == 2
    assert judge_storage(dataclasses.replace(good, free=10**8), 10**7, None).level == "warn"


def test_storage_is_used_and_left_as_it_was(tmp_path, monkeypatch):
    assert measure_storage(str(tmp_path / "runs" / "deep"), 1, 2).level == "ok"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(storage, "_read_from_disk", lambda path: bytes(NUM_BYTES))
    assert measure_storage(str(tmp_path), 1, 2).level == "fail"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"run\.storage_path"):
        measure_storage("s3://bucket/runs", 1, 2)


def test_storage_that_refuses_is_a_failure(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_use", full)
    verdict = measure_storage(str(tmp_path), 1, 2)
    assert gravity(verdict) == 2
    assert "No space left" in verdict.found


def test_a_training_set_is_opened_and_decoded(config, tmp_path):
    assert measure_dataset(config).level == "ok"
    shard = tmp_path / "train-0.tar"
    for name, content in (("a.jpg", b"\xff\xd8\xff no image"), ("a.cls", b"1")):
        (tmp_path / name).write_bytes(content)
    with tarfile.open(shard, "w") as tar:
        for name in ("a.jpg", "a.cls"):
            tar.add(tmp_path / name, name)
    data = config.data.model_copy(update={"train": str(shard)})
    verdict = measure_dataset(config.model_copy(update={"data": data}))
    assert gravity(verdict) == 2
    assert gravity(judge_dataset("x", 3, 0.1, (64, 64), None)) == 0


def test_a_recipe_whose_data_is_missing_fails_and_the_rest_goes_on(config, monkeypatch):
    monkeypatch.setattr(node, "node_checks", lambda needs, place: [Check("x", lambda: ok("y"))])
    data = config.data.model_copy(update={"train": "missing.tar", "num_classes": None})
    run = config.run.model_copy(update={"storage_path": "s3://x"})
    findings = list(examine(config.model_copy(update={"data": data, "run": run}), None))
    assert [(each.check, each.level) for each in findings] == [
        ("recipe", "fail"),
        ("x", "ok"),
        ("storage", "fail"),
    ]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the command says about this machine, as JSON."""
    folder = tmp_path_factory.mktemp("doctor")
    runs = ["--run.storage_path", "runs"]
    command = [*PROGRAM, str(RECIPE), "--json", *runs]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert ended.returncode in (0, 1), ended.stderr
    assert list(folder.iterdir()) == []
    return ended, json.loads(ended.stdout)


def test_the_command_says_all_of_this_machine(said, config):
    ended, told = said
    checks = [each["check"] for each in told["findings"]]
    expected = [check.name for check in node.node_checks(derive_needs(config), node.Place())]
    assert checks == ["recipe", *expected, "storage"]
    assert all(
        set(each) == {"check", "where", "level", "found", "mend"} for each in told["findings"]
    )
    assert ended.returncode == (1 if told["fail"] else 0)
    assert told["ok"] + told["warn"] + told["fail"] == len(checks)


def test_what_tests_need_is_well_here(said):
    levels = {each["check"]: each["level"] for each in said[1]["findings"]}
    for check in ("recipe", "own packages", "update kernels", "training set"):
        assert levels[check] == "ok"


def test_options_come_after_the_recipe_and_a_wrong_one_is_refused():
    outcome = CliRunner().invoke(doctor, ["--run.storage_path", "x"])
    assert isinstance(outcome.exception, InputError)
    outcome = CliRunner().invoke(doctor, ["missing.toml"])
    assert isinstance(outcome.exception, InputError)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_report_has_every_failure_with_its_mend(terminal):
    findings = [
        Finding("clock", "a", "ok", "fine", ""),
        Finding("clock", "b", "ok", "fine", ""),
        Finding("/dev/shm", "b", "fail", "none [at all]", "make some"),
    ]
    console = Console(force_terminal=terminal, width=200, no_color=True, record=True, quiet=False)
    with console.capture() as capture:
        report.print_report(findings, console)
    text = capture.get()
    assert "a and 1 more" in text
    assert "none [at all]" in text
    assert "make some" in text
    assert "3 checks: 1 failed" in text
    assert json.loads(report.as_json(findings))["fail"] == 1
