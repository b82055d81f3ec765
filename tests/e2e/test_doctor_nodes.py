"""The doctor at a cluster of one node: its checks there, its clock, its token, and a link."""

import json
import sys

import pytest
from clusters import MEMBERSHIP
from processes import Command

pytestmark = pytest.mark.long

PROGRAM = (sys.executable, "-c", "from asynception.doctor.command import doctor; doctor()")


def test_a_cluster_of_one_node_is_examined_and_left_running(cluster, recipe, tmp_path):
    options = ["--address", cluster.address, "--json", "--lanes.port_range", "[21000, 21049]"]
    outcome = Command(tmp_path / "doctor", *PROGRAM, str(recipe), *options, env=MEMBERSHIP).wait()
    told = json.loads(outcome.stdout)
    found = {each["check"]: each for each in told["findings"]}
    assert len(found) == len(told["findings"])
    node = cluster.address.rpartition(":")[0]
    for check in ("recipe", "cluster", "token", "clock", "one software", "training set", "link"):
        assert found[check]["level"] in ("ok", "warn"), found[check]
    assert {found[check]["where"] for check in ("clock", "memory", "ports", "link")} == {node}
    assert found["token"]["level"] == "ok"
    assert "refuses" in found["token"]["found"]
    assert "loopback" in found["link"]["found"]
    assert "21000-21049" in found["ports"]["found"]
    assert outcome.code == (1 if told["fail"] else 0)
    assert cluster.process.poll() is None
