"""Clusters of shards for the tests of lanes."""

import pytest
import torch
from lane_cluster import Cluster, layout_of

from ps.rules import SGD, warm_up
from ps.wire import AS_IS


@pytest.fixture(scope="session", autouse=True)
def _compiled():
    """As a server does at its start: some tests give a push a second."""
    warm_up(SGD(), [torch.float32, torch.bfloat16])


@pytest.fixture
def wire():
    """What clients send and receive; a file of tests may have others in its place."""
    return AS_IS


@pytest.fixture
def start(wire):
    """Starts clusters, and ends them with the test."""
    clusters = []

    def build(layout=None, **settings):
        clusters.append(Cluster(layout or layout_of(), **{"wire": wire, **settings}))
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
