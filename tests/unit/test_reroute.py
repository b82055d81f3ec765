"""A worker finds a shard where it is served now, whenever it is told."""

import pytest
import torch

from asynception.actors import WorkerProcess


class Client:
    """In place of ParameterClient."""

    def __init__(self):
        self.calls = []

    def follow(self, *move):
        self.calls.append(move)

    def connect(self):
        self.calls.append("connect")


class Connection:
    def __init__(self, client):
        self.open_lanes = lambda config: client


@pytest.fixture
def process():
    before = torch.get_num_threads()
    yield WorkerProcess(None, 1, before)
    torch.set_num_threads(before)


def test_what_a_worker_is_told_before_it_has_a_client_is_not_forgotten(process):
    process.reroute(0, "new:1", 5)
    process.reroute(0, "late:1", 3)
    client = Client()
    process._opened(Connection(client))
    assert client.calls == [(0, "new:1", 5), "connect"]


def test_a_worker_at_work_follows_at_once(process):
    client = Client()
    process._opened(Connection(client))
    process.reroute(1, "new:1", 2)
    assert client.calls == ["connect", (1, "new:1", 2)]
