"""Hosts that are cut off in the middle of a call, so that nothing tells of it."""

import os
import subprocess
import sys
from concurrent.futures import TimeoutError as TooLate
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import DEADLINE_S, background

from asynception.hosts.namespaces import lacking
from asynception.hosts.network import network

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
]

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), str(HERE)])

SEVERAL_PROBES_S = 8.0

SERVE = """
import sys, threading
from lane_cluster import TOKEN, config_of, layout_of
from ps.lanes import liveness
from ps.server import ShardServer
from ps.service import ShardService
liveness.PROBE_AFTER_S = 1
server = ShardServer(ShardService(config_of(layout_of().shards[0])), sys.argv[1], TOKEN, 2)
server.start()
print(server.address, flush=True)
threading.Event().wait()
"""

WAIT = """
import sys
import torch
from lane_cluster import TOKEN, config_of, layout_of, pull
from ps import shard_client
from ps.client import ModelState, ParameterClient, RetryPolicy, ShardUnavailable
from ps.lanes import liveness
from ps.lanes.lane import LaneSettings
from ps.shard import initial_state
address, lane = sys.argv[1:]
liveness.PROBE_AFTER_S, liveness.ANSWER_S, shard_client.MAX_PULL_WAIT_S = 1, 2, 1000
layout, hours = layout_of(), RetryPolicy(attempt_s=3600, deadline_s=36000)
client = ParameterClient([address], layout, TOKEN, hours, LaneSettings(choice=lane))
client.give_up_if(lambda shard: True)  # at the first attempt that fails
rule = config_of(layout.shards[0]).rule
state = initial_state(
    rule, torch.zeros(layout.num_parameters), torch.zeros(layout.num_statistics)
)
client.load(ModelState(state.clocks, state.vectors, {}))
pull(client)
print("waits in", *client.lanes, flush=True)
try:
    pull(client, at_least=[1])
except ShardUnavailable:
    print("gave up", flush=True)
"""


@contextmanager
def running(host, program, *arguments):
    """A program on a host; its standard output."""
    command = host.namespace.command([sys.executable, "-c", program, *arguments])
    env = {**os.environ, "PYTHONPATH": PATH}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield process.stdout
        finally:
            process.kill()


def line(output):
    """The next line, if it comes in time."""
    return background(output.readline).result(DEADLINE_S)


@pytest.fixture(params=["grpc", "tcp"])
def waits(request):
    """A host that serves, and the output of a program on another that waits for its answer."""
    with network(2) as (serving, waiting), running(serving, SERVE, serving.address) as server:
        address = line(server).strip()
        with running(waiting, WAIT, address, request.param) as client:
            assert line(client) == f"waits in {request.param}\n"
            yield serving, client


def test_who_waits_for_an_answer_of_a_host_that_vanished_learns_of_it_before_the_deadline(waits):
    serving, client = waits
    serving.cut()
    assert line(client) == "gave up\n"


def test_who_waits_for_long_at_a_host_that_is_there_goes_on_waiting(waits):
    """However often it asks whether that is so."""
    _, client = waits
    with pytest.raises(TooLate):
        background(client.readline).result(SEVERAL_PROBES_S)
