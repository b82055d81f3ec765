"""Clusters of shards for the tests of lanes."""

import pytest
from lane_cluster import Cluster, layout_of

from ps.rules import SGD, warm_up


@pytest.fixture(scope="session", autouse=True)
def _compiled():
    """As a server does at its start: some tests give a push a second."""
    warm_up(SGD())


@pytest.fixture
def start():
    """Starts clusters, and ends them with the test."""
    clusters = []

    def build(layout=None, **settings):
        clusters.append(Cluster(layout or layout_of(), **settings))
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
