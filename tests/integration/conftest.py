"""Clusters of shards for the tests of lanes."""

import pytest
import torch
from lane_cluster import Cluster, layout_of
from waiting import DEADLINE_S

from ps.lanes import calling, gate
from ps.rules import SGD, warm_up
from ps.wire import AS_IS


@pytest.fixture(scope="session", autouse=True)
def _compiled():
    """As a server does at its start: some tests give a push a second."""
    warm_up(SGD(), [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """A connection is let in, and may stand still before that, as long as anything may take here:
    on a busy machine the limits of a run would cut off what a test has or counts."""
    monkeypatch.setattr(gate, "ADMISSION_S", DEADLINE_S)
    monkeypatch.setattr(calling, "HANDSHAKE_S", DEADLINE_S)


@pytest.fixture
def wire():
    """What clients send and receive; a file of tests may have others in its place."""
    return AS_IS


@pytest.fixture
def tls():
    """Identities of servers and clients: none, unless a file of tests has others in its place."""


@pytest.fixture
def start(wire, tls):
    """Starts clusters, and ends them with the test."""
    clusters = []

    def build(layout=None, **settings):
        own = {"wire": wire, "tls": tls}
        clusters.append(Cluster(layout or layout_of(), **(own | settings)))
        return clusters[-1]

    yield build
    for cluster in clusters:
        cluster.close()


@pytest.fixture
def loaded(start):
    """Starts clusters whose shards all begin at 0."""

    def build(*arguments, **settings):
        cluster = start(*arguments, **settings)
        cluster.load()
        return cluster

    return build
