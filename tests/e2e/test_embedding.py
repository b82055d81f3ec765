"""Asynception inside programs and clusters that are not its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import MEMBERSHIP
from conftest import BATCH_SIZE
from processes import RUN_TIMEOUT_S, Command, TrainRun, checkpoints, read_result, wait_for

from asynception.recipe import load_config

pytestmark = pytest.mark.long

SAMPLES = 20 * BATCH_SIZE
SMALL = {
    "training.samples": SAMPLES,
    "scaling.num_workers": 1,
    "scaling.num_servers": 1,
    "run.placement_timeout_s": 120.0,
}

EMBEDDING = """
import json, os, sys, time
from pathlib import Path

tests = os.getppid()
import ray
from asynception import TrainConfig, Trainer

ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
config = TrainConfig.model_validate_json(Path("config.json").read_text())
result = Trainer(config).fit()
assert ray.is_initialized()

@ray.remote(num_cpus=2)  # all of them: the run must have given back its own
def address():
    return ray.get_runtime_context().gcs_address

fitted = {name: getattr(result, name) for name in ("status", "samples", "metrics", "checkpoint")}
fitted |= {"path": str(result.path), "address": ray.get(address.remote(), timeout=240)}
Path("fitted.json").write_text(json.dumps(fitted))
while not Path("joined").exists():
    assert os.getppid() == tests, "nobody will say so any more"
    time.sleep(0.05)
assert ray.get(address.remote(), timeout=240) == fitted["address"]
ray.shutdown()
"""
"""A program that trains in a Ray of its own, and keeps that for others until it is told to end."""


@pytest.fixture(scope="module")
def program(recipe, tmp_path_factory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("program")
    options = [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]
    config = load_config(recipe, [*options, "--run.storage_path", str(folder / "runs")])
    (folder / "config.json").write_text(config.model_dump_json())
    program = Command(folder, sys.executable, "-c", EMBEDDING, env=MEMBERSHIP)
    yield program
    program.kill_all()


@pytest.fixture(scope="module")
def fitted(program) -> dict[str, Any]:
    """What `Trainer.fit` returned."""
    path = program.folder / "fitted.json"
    wait_for(lambda: path.exists() or program.process.poll() is not None, RUN_TIMEOUT_S, path.name)
    assert path.exists(), str(program.output)
    return json.loads(path.read_text())


def test_fit_returns_what_it_writes(fitted):
    path = Path(fitted["path"])
    result = read_result(path)
    assert fitted["status"] == result["status"] == "finished"
    assert fitted["samples"] == result["samples"] == SAMPLES
    assert fitted["metrics"] == result["eval"]
    assert fitted["checkpoint"] == result["checkpoint"]
    assert fitted["checkpoint"] == str(path / "checkpoints" / checkpoints(path)[-1])


def test_a_run_joins_a_cluster_by_its_address_and_leaves_it_running(
    program, fitted, recipe, tmp_path
):
    settings = {**SMALL, "ray.address": fitted["address"]}
    run = TrainRun(tmp_path, recipe, settings, env=MEMBERSHIP)
    outcome = run.wait()
    assert outcome.code == 0, str(outcome)
    assert (run.result()["status"], run.result()["samples"]) == ("finished", SAMPLES)
    run.wait_until_gone()
    (program.folder / "joined").touch()
    assert program.wait().code == 0, str(program.output)
    program.wait_until_gone()


@pytest.mark.parametrize("name", ["model", "ps", "worker", "protos"])
def test_a_stranger_s_package_of_our_name_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    importing = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import asynception"
    done = subprocess.run([sys.executable, "-c", importing], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: asynception needs its own package '{name}'")
    assert str(tmp_path / name) in last
