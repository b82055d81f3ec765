"""Checkpoints in a bucket, through s3fs, at a server that fails in the middle of a write."""

import pytest
import s3fs
import torch
from s3_server import BUCKET, S3Server, s3_server

from model.errors import InputError
from model.flat import Segment, flat_numel
from ps.checkpoint import ModelLayout
from ps.checkpoint_store import (
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    set_aside,
    write_checkpoint,
)
from ps.client import ModelState
from ps.remote_checkpoint import RemoteFolder, StorageError
from ps.schedule import Clocks

LAYOUT = ModelLayout((Segment("weight", (3, 5), 0, True),), (Segment("bn", (7,), 0, False),))
NUM_REQUESTS = 6
"""That write, of a checkpoint: two files of tensors, metadata under another name, a copy of them
under their own, the deletion of the others, and one more than that."""


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(server: S3Server):
    """Its files, empty at first."""
    fs = s3fs.S3FileSystem(**server.options, skip_instance_cache=True)
    fs.mkdir(BUCKET)
    yield fs
    server.writes_left = None
    fs.rm(BUCKET, recursive=True)


@pytest.fixture
def folder(server: S3Server, bucket, tmp_path):
    return RemoteFolder(f"s3://{BUCKET}/runs/one", tmp_path, server.options)


def state_of(updates: int) -> ModelState:
    parameters = torch.full((flat_numel(LAYOUT.parameters),), float(updates))
    parameters[15:] = 0  # padding
    statistics = torch.zeros(flat_numel(LAYOUT.statistics))
    vectors = {"parameters": parameters, "ema": parameters}
    vectors |= {"statistics": statistics, "ema_statistics": statistics}
    return ModelState(Clocks(updates, 8 * updates), vectors, {})


def write(folder: RemoteFolder, updates: int):
    return write_checkpoint(folder, state_of(updates), LAYOUT, {"wall_s": updates})


def assert_whole(saved, updates: int) -> None:
    checkpoint = read_checkpoint(saved, LAYOUT, ())
    expected = state_of(updates)
    assert (checkpoint.state.clocks, checkpoint.extra) == (expected.clocks, {"wall_s": updates})
    vectors = checkpoint.state.vectors
    assert all(torch.equal(v, expected.vectors[n]) for n, v in vectors.items())


def by_updates(folder: RemoteFolder):
    return {int(each.name.split("-")[1]): each for each in list_checkpoints(folder)}


def test_what_is_written_comes_back_and_is_pruned_and_set_aside(folder, bucket):
    assert list_checkpoints(folder) == []
    for updates in (5, 40, 9):
        assert_whole(write(folder, updates), updates)
    assert list(by_updates(folder)) == [5, 9, 40]
    prune_checkpoints(folder, 2)
    assert list(by_updates(folder)) == [9, 40]
    set_aside(by_updates(folder)[40])
    assert list(by_updates(folder)) == [9]
    folders = {path.split("/")[3] for path in bucket.find(BUCKET)}
    assert folders == {"checkpoint-000000009", "diverged-000000040"}


def test_a_bucket_that_fails_at_any_request_of_a_write_costs_nothing_old(folder, bucket, server):
    for updates in (1, 2):
        write(folder, updates)
    for num_good in range(NUM_REQUESTS):
        server.writes_left, server.num_failed = num_good, 0
        outcome = None
        try:
            write(folder, 10 + num_good)
        except OSError as error:
            outcome = error
        server.writes_left = None
        assert isinstance(outcome, StorageError) is (server.num_failed > 0)
        assert "\n" not in str(outcome)
        found = by_updates(folder)
        assert {1, 2} <= set(found)
        for updates, saved in found.items():
            assert_whole(saved, updates)
    assert server.num_failed == 0, "the last one had no request that failed"
    prune_checkpoints(folder, 1)
    assert {path.split("/")[3] for path in bucket.find(BUCKET)} == {"checkpoint-000000015"}


def test_a_bucket_that_is_not_there_is_not_made(bucket, server, tmp_path):
    folder = RemoteFolder("s3://typo/runs/one", tmp_path, server.options)
    assert list_checkpoints(folder) == []
    with pytest.raises(StorageError, match="bucket does not exist"):
        write(folder, 5)
    bucket.invalidate_cache()
    assert not bucket.exists("typo")


def test_who_has_no_right_to_a_bucket_is_told_in_a_line(folder, server, tmp_path):
    write(folder, 5)
    options = server.options | {"key": "another"}
    with pytest.raises(InputError, match=f"s3://{BUCKET}/runs/one can't be listed: Perm") as told:
        list_checkpoints(RemoteFolder(folder.url, tmp_path, options))
    assert "\n" not in str(told.value)
