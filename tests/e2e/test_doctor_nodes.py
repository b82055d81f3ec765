"""The doctor at a cluster of one node: its checks there, its clock, its token, and a link."""

import json
import secrets
import sys

import pytest
from processes import RUN_TIMEOUT_S, Command, wait_for

HOLDING = """
import time
from pathlib import Path

import ray

ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
Path("starting").write_text(ray.get_runtime_context().gcs_address)
Path("starting").rename("address")
while not Path("done").exists():
    time.sleep(0.05)
ray.shutdown()
"""
"""A program that keeps a Ray for others until it is told to end."""

MEMBERSHIP = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
PROGRAM = (sys.executable, "-c", "from asynception.doctor.command import doctor; doctor()")


@pytest.fixture
def ray_address(tmp_path):
    folder = tmp_path / "ray"
    program = Command(folder, sys.executable, "-c", HOLDING, env=MEMBERSHIP)
    try:
        wait_for((folder / "address").exists, RUN_TIMEOUT_S, "Ray")
        yield (folder / "address").read_text()
        (folder / "done").touch()
        assert program.wait().code == 0
    finally:
        program.kill_all()


def test_a_cluster_of_one_node_is_examined_and_left_running(ray_address, recipe, tmp_path):
    options = ["--address", ray_address, "--json", "--lanes.port_range", "[21000, 21049]"]
    outcome = Command(tmp_path / "doctor", *PROGRAM, str(recipe), *options, env=MEMBERSHIP).wait()
    told = json.loads(outcome.stdout)
    found = {each["check"]: each for each in told["findings"]}
    assert len(found) == len(told["findings"])
    node = ray_address.rpartition(":")[0]
    for check in ("recipe", "cluster", "token", "clock", "one software", "training set", "link"):
        assert found[check]["level"] in ("ok", "warn"), found[check]
    assert {found[check]["where"] for check in ("clock", "memory", "ports", "link")} == {node}
    assert found["token"]["level"] == "ok"
    assert "refuses" in found["token"]["found"]
    assert "loopback" in found["link"]["found"]
    assert "21000-21049" in found["ports"]["found"]
    assert outcome.code == (1 if told["fail"] else 0)
