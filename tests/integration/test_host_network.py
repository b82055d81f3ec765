"""Hosts made from network namespaces: what reaches whom, and that nothing stays behind."""

import json
import os
import subprocess
import sys

import pytest
from waiting import eventually

from asynception.hosts import namespaces
from asynception.hosts.namespaces import PREFIX, lacking, mounts_as_before, run, sweep
from asynception.hosts.network import network

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
]

PORT = 4000
ECHO = f"""
import socket, threading
def give():
    with socket.create_server(("", {PORT})) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(bytes(1_000_000))
threading.Thread(target=give, daemon=True).start()
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", {PORT}))
print("ready", flush=True)
while True:
    s.sendto(*s.recvfrom(2048))
"""
ASK = f"""
import json, socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], {PORT}))
def asked(timeout_s):
    s.settimeout(timeout_s)
    began_s = time.monotonic()
    try:
        s.send(bytes(1000))
        s.recv(2048)
    except OSError:
        return None
    return time.monotonic() - began_s
print(json.dumps([asked(float(sys.argv[3])) for _ in range(int(sys.argv[2]))]))
"""


def mine():
    """What exists of this process."""
    return [line for line in run("ip", "netns", "list").split() if line.endswith(f"-{os.getpid()}")]


@pytest.fixture
def pair():
    """Two hosts, the first of which sends back what it gets."""
    with network(2) as (server, client):
        command = server.namespace.command([sys.executable, "-c", ECHO])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            yield server, client
            process.kill()


def answers(client, server, count=1, timeout_s=5.0):
    """Seconds that each answer took; None for none."""
    command = [sys.executable, "-c", ASK, server.address, str(count), str(timeout_s)]
    return json.loads(client.namespace.run(*command))


FETCH = f"""
import socket, sys
with socket.create_connection((sys.argv[1], {PORT})) as s:
    print(sum(len(part) for part in iter(lambda: s.recv(65536), b"")))
"""


TELL = f"""
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], {PORT}))
s.settimeout(0.05)
came = set()
for group in range(0, int(sys.argv[2]), 20):
    for number in range(group, group + 20):
        s.send(b"%d" % number)
    last = -1 - group  # asked for again until it is answered, after all that came before it
    while last not in came:
        s.send(b"%d" % last)
        try:
            while last not in came:
                came.add(int(s.recv(2048)))
        except TimeoutError:
            pass
print(sum(number >= 0 for number in came))
"""


def test_hosts_reach_each_other_unless_cut_off(pair):
    server, client = pair
    assert None not in answers(client, server)
    server.cut()
    assert answers(client, server, timeout_s=0.2) == [None]
    server.mend()
    assert None not in answers(client, server)


def test_a_link_loses_the_share_that_it_is_told_to(pair):
    server, client = pair
    assert None not in answers(client, server)  # they know each other's addresses from now on
    client.lose(0.3)  # there and back: 0.51 of the answers come
    came = int(client.namespace.run(sys.executable, "-c", TELL, server.address, "200"))
    assert 60 < came < 150
    client.mend()
    assert None not in answers(client, server, 20)


def test_a_slow_link_takes_the_time_of_its_rate(pair):
    server, client = pair
    client.slow(mbit=0.1, queue_ms=1000)
    took_s = answers(client, server, 20, timeout_s=5.0)
    assert max(took_s[15:]) > 0.05  # 1 kB at 100 kbit/s is 80 ms, once the burst is used up


def test_a_delayed_link_takes_that_much_longer_each_way(pair):
    server, client = pair
    with client.delayed(0.05):
        took_s = answers(client, server, 5)
        assert None not in took_s
        assert min(took_s) > 0.1
        assert client.namespace.run(sys.executable, "-c", FETCH, server.address) == "1000000\n"
    assert None not in answers(client, server, 5)
    assert "line" not in client.switch.run("ip", "link")


def test_killing_a_host_takes_all_of_its_processes_and_no_others():
    with network(2) as (dying, living):
        spawn = ["sh", "-c", "sleep 1000 & sleep 1000"]
        for host in (dying, living):
            subprocess.Popen(host.namespace.command(spawn), start_new_session=True)
        eventually(lambda: all(len(host.namespace.pids()) == 3 for host in (dying, living)))
        dying.namespace.kill()
        assert dying.namespace.pids() == []
        assert len(living.namespace.pids()) == 3
        left = living.namespace.pids()
    assert mine() == []
    assert not any(os.path.exists(f"/proc/{pid}/root") for pid in left if _is_running(pid))


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_start_that_fails_leaves_nothing():
    with pytest.raises(RuntimeError, match="3 namespaces"), network(2):
        raise RuntimeError(f"{len(mine())} namespaces")
    assert mine() == []


def test_mounts_are_as_they_were():
    def mounted():
        with open("/proc/self/mountinfo") as file:
            return [line for line in file if line.split()[4].startswith("/run/netns")]

    others = [name for name in run("ip", "netns", "list").splitlines() if name]
    if others:
        pytest.skip(f"others use namespaces here: {others}")
    before = mounted()
    with network(1):
        assert len(mounted()) > len(before)
    assert mounted() == before


@pytest.fixture
def left():
    """The name of what a program that is no more has left."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    name = f"{PREFIX}-host0-{gone.pid}"
    with mounts_as_before():
        run("ip", "netns", "add", name)
        yield name
    assert name not in run("ip", "netns", "list")


def test_what_a_killed_program_left_is_removed_by_the_next_one(left):
    assert sweep() == [left]


def test_two_programs_may_remove_what_a_third_one_left(left, monkeypatch):
    """The other one is quicker, once this one has seen what is left."""
    remove = namespaces._remove

    def late(made):
        remove(made)
        remove(made)

    monkeypatch.setattr(namespaces, "_remove", late)
    assert left not in sweep()
