"""The doctor at a cluster of three hosts, of which one has a slow link and another a low limit."""

import json

import psutil
import pytest
from processes import Command
from test_doctor_nodes import PROGRAM

from asynception.hosts.namespaces import lacking
from asynception.hosts.ray_nodes import NodeOptions, ray_nodes

pytestmark = [
    pytest.mark.long,
    pytest.mark.alone,  # for the speed of links
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
]

NODES = (
    NodeOptions(resources={"server": 1}),
    NodeOptions(resources={"worker": 1}),
    NodeOptions(resources={"worker": 1}),
)
SLOW, LIMITED = 1, 2
GBIT = 0.4
OPEN_FILES = 4096
"""What Ray's daemons want is 8192."""


@pytest.fixture(scope="module")
def examined(recipe, tmp_path_factory):
    """The hosts' addresses and what the doctor found, by check."""
    with ray_nodes(NODES) as nodes:
        nodes.hosts[SLOW].limit(GBIT)
        for pid in nodes.hosts[LIMITED].namespace.pids():
            psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
        options = ["--address", nodes.address, "--json"]
        command = nodes.command(0, [*PROGRAM, str(recipe), *options])
        folder = tmp_path_factory.mktemp("doctor") / "doctor"
        outcome = Command(folder, *command, env=nodes.environment).wait()
    told = json.loads(outcome.stdout)
    assert outcome.code == (1 if told["fail"] else 0)
    found = {}
    for each in told["findings"]:
        found.setdefault(each["check"], []).append(each)
    return [host.address for host in nodes.hosts], found


def test_every_host_is_examined_and_they_are_told_apart(examined):
    addresses, found = examined
    for check in ("clock", "versions", "update kernels", "memory", "ports", "training set"):
        assert [each["where"] for each in found[check]] == addresses
        assert {each["level"] for each in found[check]} <= {"ok", "warn"}
    assert [each["level"] for each in found["open files"]] == ["ok", "ok", "warn"]
    assert f"{OPEN_FILES} files" in found["open files"][LIMITED]["found"]
    for check in ("cluster", "token", "one software"):
        (only,) = found[check]
        assert (only["where"], only["level"]) == ("cluster", "ok"), only
    assert "3 nodes" in found["cluster"][0]["found"]


def test_the_slow_link_is_named(examined):
    (head, slow, other), found = examined
    links = {each["where"]: each for each in found["link"]}
    assert set(links) == {f"{head} - {slow}", f"{slow} - {other}", f"{other} - {head}", slow}
    assert links[f"{head} - {slow}"]["level"] != "ok"
    assert links[f"{slow} - {other}"]["level"] != "ok"
    assert "probably its own link" in links[slow]["found"]
    assert links[slow]["mend"]
