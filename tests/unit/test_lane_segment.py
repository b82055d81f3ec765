"""Vectors in memory that another process can map, and gradients that live there."""

import contextlib
import faulthandler
import gc
import mmap
import multiprocessing
import os
import resource
import signal

import pytest
import torch
from torch import nn

from model.flat import FlatModule
from ps.lanes.lane import LaneError
from ps.lanes.segment import map_vector, offset_in_segment, segment_of, shared_zeros
from worker.gradient import GradientComputer
from worker.host_vectors import HostVectors
from worker.objective import create_objective

NUMEL = 5000  # more than a page


def open_files():
    """What the descriptors of this process stand for; others may come and go meanwhile."""
    gc.collect()
    files = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            files.add(os.stat(f"/proc/self/fd/{name}")[1:3])
    return files


def test_a_mapping_shows_what_the_maker_writes():
    vector = shared_zeros(NUMEL)
    assert (vector == 0).all()
    segment = segment_of(vector)
    for start, numel in ((0, NUMEL), (16, 100), (1024, 16), (3001, 1999)):
        view = map_vector(segment.fd, 4 * start, numel)
        vector.copy_(torch.randn(NUMEL))
        assert torch.equal(view, vector[start : start + numel])


def test_views_know_their_segment_and_place():
    vector = shared_zeros(NUMEL)
    view = vector[32:].view(-1, 4)[3]
    assert segment_of(view) is segment_of(vector) is not None
    assert offset_in_segment(view) == 4 * (32 + 12)
    assert segment_of(torch.zeros(5)) is None
    assert segment_of(shared_zeros(5)) is not segment_of(vector)
    assert shared_zeros(0).numel() == 0


def test_nobody_but_the_maker_can_write_or_resize():
    vector = shared_zeros(NUMEL)
    fd = segment_of(vector).fd
    with pytest.raises(OSError, match="not permitted"):
        mmap.mmap(fd, 4 * NUMEL, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    for attempt in (lambda: os.write(again, b"1"), lambda: os.ftruncate(again, 0)):
        with pytest.raises(OSError, match="not permitted"):
            attempt()
    os.close(again)
    vector.fill_(1)
    assert (vector == 1).all()


def write_to(path):
    """Through the pages themselves; the kernel ends the process, which needs no word of it."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    view = map_vector(os.open(path, os.O_RDWR), 0, NUMEL)
    view.fill_(1.0)


def test_a_reader_that_writes_dies_of_it():
    vector = shared_zeros(NUMEL)
    path = f"/proc/{os.getpid()}/fd/{segment_of(vector).fd}"
    process = multiprocessing.get_context("spawn").Process(target=write_to, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGSEGV
    assert (vector == 0).all()


@pytest.mark.parametrize(
    ("offset", "numel"), [(0, NUMEL + 1), (4, NUMEL), (2, 5), (-4, 5), (0, 0), (1 << 40, 1)]
)
def test_places_outside_of_a_segment_are_refused(offset, numel):
    vector = shared_zeros(NUMEL)
    segment = segment_of(vector)
    room = os.fstat(segment.fd).st_size
    if offset == 0 and numel > 0:
        numel = room // 4 + 1
    with pytest.raises(LaneError):
        map_vector(segment.fd, offset, numel)


def test_what_could_shrink_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(bytes(4 * NUMEL))
    unsealed = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4 * NUMEL)
    with open(tmp_path / "file", "rb") as file:
        for fd in (file.fileno(), unsealed):
            with pytest.raises(LaneError):
                map_vector(fd, 0, NUMEL)
    os.close(unsealed)


def test_memory_and_descriptors_go_with_the_last_tensor():
    before = open_files()
    vector = shared_zeros(NUMEL)
    view, mapped = vector[10:20], map_vector(segment_of(vector).fd, 0, NUMEL)
    own = os.fstat(segment_of(vector).fd)[1:3]
    del vector
    assert segment_of(view) is not None
    assert own in open_files()
    del view
    assert own in open_files()
    assert (mapped == 0).all()
    del mapped
    assert own not in open_files() | before


def test_without_memfd_vectors_are_private(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    vector = shared_zeros(NUMEL)
    assert (vector == 0).all()
    assert segment_of(vector) is None


def test_memory_that_the_system_refuses_is_private_with_a_warning(monkeypatch, caplog):
    def refuse(*_):
        raise OSError("no memory")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert segment_of(shared_zeros(NUMEL)) is None
    assert "no shared memory for 5000 elements" in caplog.text


def test_gradients_and_deltas_live_in_shared_memory_and_training_goes_on_there():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    flat = FlatModule(module)
    computer = GradientComputer(flat, create_objective("multilabel", 4), clip_norm=None)
    vectors = HostVectors(computer).mailbox
    assert segment_of(vectors.gradients) is segment_of(flat.gradients) is not None
    assert segment_of(vectors.statistics_delta) is segment_of(computer.statistics_delta) is not None
    flat.check_views()
    module(torch.randn(3, 6)).sum().backward()
    assert (vectors.gradients != 0).any()
    for parameter in module.parameters():
        assert segment_of(parameter.grad) is segment_of(flat.gradients)
    flat.zero_gradients()
    assert (vectors.gradients == 0).all()
    flat.place_gradients(torch.ones(flat.gradients.numel()))
    module(torch.randn(3, 6)).sum().backward()
    flat.check_views()
    assert (vectors.gradients == 0).all()
