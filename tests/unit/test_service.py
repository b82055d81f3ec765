"""The shard among threads: exact cuts, pulls that never wait and never tear, reused staging."""

import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from waiting import DEADLINE_S, background, eventually

from ps import shard as shard_module
from ps.consistency import Async
from ps.layout import Range, ShardRanges
from ps.push import Push
from ps.rules import SGD, Ema
from ps.schedule import Clocks, Constant, Horizon
from ps.service import LateLoad, NotLoaded, ShardService
from ps.shard import Outcome, ShardConfig, initial_state

NUM_PARAMETERS, NUM_STATISTICS = 4096, 16
FOREVER_S = 3600.0
EMA_DECAY = 0.5


def loaded_service(**clock) -> ShardService:
    ranges = ShardRanges(Range(0, NUM_PARAMETERS), Range(0, NUM_STATISTICS), ())
    horizon = Horizon(epoch_samples=100, num_workers=4)
    config = ShardConfig(ranges, SGD(), Constant(lr=1.0), horizon, Ema(decay=EMA_DECAY), Async())
    service = ShardService(config, **clock)
    service.load(start_state(service))
    return service


def start_state(service, start=0.0):
    parameters = torch.full((NUM_PARAMETERS,), start)
    return initial_state(service.config.rule, parameters, torch.zeros(NUM_STATISTICS))


def push_ones(service, worker, sequence):
    with service.staging() as staging:
        staging.gradient.fill_(1.0)
        staging.statistics_delta.fill_(1.0)
        return service.push(
            Push(worker, 0, sequence, 0, 2, staging.gradient, staging.statistics_delta)
        )


class Pushers:
    """Threads that push ones, each its own worker, until the block ends."""

    def __init__(self, service, num_workers):
        self.service, self.num_workers = service, num_workers

    def __enter__(self):
        self.enough = threading.Event()
        workers = range(self.num_workers)
        self.futures = [background(lambda worker=worker: self.work(worker)) for worker in workers]
        return self

    def work(self, worker):
        sequence = 0
        while not self.enough.is_set():
            receipt = push_ones(self.service, worker, sequence)
            assert receipt.outcome is Outcome.APPLIED
            sequence += 1
        return sequence

    def __exit__(self, *_):
        self.enough.set()
        self.pushes = [future.result(DEADLINE_S) for future in self.futures]


def waiting_cut(service, name, version, names=None):
    """A cut that waits in a thread, known to the service."""
    cut = background(lambda: service.cut(name, version, FOREVER_S, names))
    eventually(lambda: name in service._cuts)
    return cut


def ema_after(version):
    ema = 0.0
    for update in range(1, version + 1):
        ema = EMA_DECAY * ema - (1 - EMA_DECAY) * update
    return ema


def test_a_cut_is_taken_at_its_very_version_while_threads_push():
    service, target = loaded_service(), 57
    cut = waiting_cut(service, "cut", target)
    with Pushers(service, 3) as pushers:
        cut.result(DEADLINE_S)
        # Everything went on meanwhile: what is captured is not what stands now.
        eventually(lambda: service.status().clocks.updates > target)
    state = service.captured("cut")
    assert state.clocks == Clocks(target, 2 * target)
    assert (state.vectors["parameters"] == -target).all()
    assert (state.vectors["statistics"] == target).all()
    assert state.vectors["ema"].tolist() == pytest.approx([ema_after(target)] * NUM_PARAMETERS)
    assert sum(lives[0] + 1 for lives in state.last_sequences.values()) == target
    assert service.status().clocks.updates == sum(pushers.pushes)


def test_several_cuts_wait_for_their_own_versions():
    service = loaded_service()
    targets = {"a": 5, "b": 9, "c": 5}
    cuts = [waiting_cut(service, name, version) for name, version in targets.items()]
    with Pushers(service, 2):
        for cut in cuts:
            cut.result(DEADLINE_S)
    assert {n: service.captured(n).clocks.updates for n in targets} == targets


def test_a_cut_of_a_version_that_has_passed_is_taken_at_once():
    service = loaded_service()
    for sequence in range(3):
        push_ones(service, 0, sequence)
    background(lambda: service.cut("cut", 2, FOREVER_S, ["parameters"])).result(DEADLINE_S)
    state = service.captured("cut")
    assert state.clocks.updates == 3
    assert list(state.vectors) == ["parameters"]


@pytest.mark.parametrize("wait_s", [0.0, 0.01])
def test_a_cut_in_vain_is_taken_where_the_shard_stands(wait_s):
    service = loaded_service()
    for sequence in range(3):
        push_ones(service, 0, sequence)
    service.cut("cut", 10, wait_s, None)
    assert service.captured("cut").clocks.updates == 3
    for sequence in range(3, 12):  # reaching the version later doesn't cut again
        push_ones(service, 0, sequence)
    assert (service.captured("cut").vectors["parameters"] == -3).all()


def test_a_name_holds_its_last_cut_until_it_is_released():
    service = loaded_service()
    service.cut("cut", 0, 0.0, None)
    push_ones(service, 0, 0)
    service.cut("cut", 0, 0.0, None)
    assert service.captured("cut").clocks.updates == 1
    service.cut("other", 0, 0.0, None)
    service.release("cut")
    assert service.captured("cut") is None
    assert service.captured("other") is not None
    service.release("cut")  # of nothing: no effect


def test_a_cut_released_while_it_waits_ends_with_the_version_and_keeps_nothing():
    service = loaded_service()
    first = waiting_cut(service, "cut", 3)
    service.release("cut")
    second = waiting_cut(service, "cut", 2)
    for sequence in range(3):
        push_ones(service, 0, sequence)
    second.result(DEADLINE_S)
    assert service.captured("cut").clocks.updates == 2
    assert not first.done()


def test_pulls_are_whole_while_threads_push():
    service = loaded_service()
    with Pushers(service, 2):
        last = -1
        for _ in range(200):
            with service.pinned() as snapshot:
                version = snapshot.version
                for _ in range(2):  # still the same after others had their turn
                    assert (snapshot.parameters == -version).all()
                    assert (snapshot.statistics == version).all()
            assert version >= last
            last = version
        eventually(lambda: service.status().clocks.updates > 200)
    assert service.status().num_buffers <= 3


def pull(service):
    with service.pinned() as snapshot:
        return snapshot.version, snapshot.parameters.clone()


def test_a_pull_does_not_wait_for_the_update_lock():
    service = loaded_service()
    with service._lock:
        version, _ = background(lambda: pull(service)).result(DEADLINE_S)
    assert version == 0


def test_a_pull_in_the_middle_of_an_update_gets_the_version_before(monkeypatch):
    """The update stands still with the next version written and its averages moved."""
    service = loaded_service()
    written, go_on = threading.Event(), threading.Event()
    real = shard_module.apply_rule

    def halting(*arguments):
        real(*arguments)
        written.set()
        assert go_on.wait(DEADLINE_S)

    monkeypatch.setattr(shard_module, "apply_rule", halting)
    push = background(lambda: push_ones(service, 0, 0))
    assert written.wait(DEADLINE_S)
    version, parameters = background(lambda: pull(service)).result(DEADLINE_S)
    assert version == 0
    assert (parameters == 0).all()
    go_on.set()
    assert push.result(DEADLINE_S).version == 0
    version, parameters = pull(service)
    assert version == 1
    assert (parameters == -1).all()


def test_a_pull_that_fails_gives_its_pin_back():
    service = loaded_service()
    pins = []

    def fail():
        with service.pinned() as snapshot:
            pins.append(snapshot.pins)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with service.pinned() as snapshot:
        assert snapshot.pins == pins[0] == 1


def test_a_pull_outlives_a_load():
    service = loaded_service()
    with service.pinned() as snapshot:
        service.load(start_state(service, 5.0))
        assert (snapshot.parameters == 0).all()
    assert (pull(service)[1] == 5.0).all()


def test_staging_is_reused():
    service = loaded_service()
    with service.staging() as first:
        pass
    with service.staging() as again:
        assert again is first
        with service.staging() as beside:
            assert beside is not first
            assert beside.gradient.data_ptr() != first.gradient.data_ptr()
    with ExitStack() as stack:
        both = [stack.enter_context(service.staging()) for _ in range(2)]
    assert {id(staging) for staging in both} == {id(first), id(beside)}
    assert first.gradient.shape == (NUM_PARAMETERS,)
    assert first.statistics_delta.shape == (NUM_STATISTICS,)


def test_staging_comes_back_from_a_push_that_fails():
    service = loaded_service()
    with pytest.raises(ZeroDivisionError), service.staging() as first:
        raise ZeroDivisionError
    with service.staging() as again:
        assert again is first


def test_threads_share_as_many_staging_buffers_as_they_are():
    service = loaded_service()
    with Pushers(service, 4):
        eventually(lambda: service.status().clocks.updates > 100)
    assert 1 <= len(service._spare_staging) <= 4
    gradients = [staging.gradient.data_ptr() for staging in service._spare_staging]
    assert len(set(gradients)) == len(gradients)


def test_before_load_there_is_nothing_to_do():
    service = ShardService(loaded_service().config)
    calls = [
        lambda: pull(service),
        lambda: push_ones(service, 0, 0),
        lambda: service.fence(0, 1),
        lambda: service.cut("cut", 0, 0.0, None),
        service.status,
    ]
    for call in calls:
        with pytest.raises(NotLoaded):
            call()
    assert service.captured("cut") is None
    service.release("cut")


def test_load_replaces_a_state_that_has_not_moved_and_forgets_cuts():
    service = loaded_service()
    service.cut("cut", 0, 0.0, None)
    service.load(start_state(service, 5.0))
    assert service.captured("cut") is None
    assert push_ones(service, 0, 0).outcome is Outcome.APPLIED
    assert (pull(service)[1] == 4.0).all()


def test_a_late_load_undoes_nothing():
    service = loaded_service()
    service.load(replace(start_state(service, 5.0), clocks=Clocks(7, 9)))
    with pytest.raises(LateLoad, match="newer"):
        service.load(start_state(service, 6.0))
    push_ones(service, 0, 0)
    with pytest.raises(LateLoad, match="settled pushes"):
        service.load(replace(start_state(service, 6.0), clocks=Clocks(8, 10)))
    assert (pull(service)[1] == 4.0).all()


def test_status_counts_pushes_buffers_and_seconds():
    """The clock moves by a second at each look, so that each push takes one."""
    ticks = iter(range(1000))
    service = loaded_service(clock=lambda: float(next(ticks)))
    for sequence in range(3):
        push_ones(service, 7, sequence)
    push_ones(service, 7, 2)  # a retry
    service.fence(7, 1)
    push_ones(service, 7, 3)
    status = service.status()
    assert status.clocks == Clocks(3, 6)
    assert status.pushes == {"applied": 3, "fenced": 1}
    assert status.last_sequences == {7: {0: 2}}
    assert status.num_buffers == 2
    assert (status.apply_s, status.queue_s, status.gate_s) == (5.0, 5.0, 0.0)


def test_status_counts_the_seconds_that_pulls_are_held_up_and_who_reads():
    ticks = iter(range(1000))
    service = loaded_service(clock=lambda: float(next(ticks)))
    assert service.reached(0, FOREVER_S)
    assert service.status().gate_s == 0.0
    assert not service.reached(1, 0.0)
    with service.pinned(), service.pinned():
        status = service.status()
    assert (status.gate_s, status.num_pins) == (1.0, 2)
    assert service.status().num_pins == 0


def test_a_late_word_of_who_is_at_work_has_no_effect():
    service = loaded_service()
    told = []
    service._loaded().expect = told.append
    for number, workers in ((1, {0, 1}), (3, {0}), (2, {0, 1}), (3, {0, 1}), (4, set())):
        service.expect(workers, number)
    assert told == [{0, 1}, {0}, set()]
