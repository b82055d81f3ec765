"""Lives of workers at the coordinator, on a fake clock and with workers that are plain objects."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynception.coordinator import Coordinator
from asynception.ledger import BatchLeases, Ledger, Position
from asynception.totals import Totals
from ps.receipts import Settled
from ps.shard import Outcome, Receipt
from worker.data.lease import Lease
from worker.step_report import GradientSummary, StepReport


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def step(sequence: int, num_samples: int = 2) -> StepReport:
    receipt = Receipt(Outcome.APPLIED, sequence + 1, sequence % 3, 0.1)
    return StepReport(sequence, num_samples, (), GradientSummary(1.5, 2.0), (receipt,), 0.1)


def coordinator(total: int = 16, batch_size: int = 2, lease_batches: int = 2) -> Coordinator:
    leases = BatchLeases(batch_size, lease_batches)
    return Coordinator(Ledger(total, batch_size, leases), Totals(), FakeClock())


def upto(sequence: int) -> Settled:
    return Settled(sequence, sequence)


def test_incarnations_of_each_worker_rise_from_zero():
    control = coordinator()
    assert [control.enlist(worker) for worker in (0, 1, 7)] == [0, 0, 0]
    for incarnation in (1, 2, 3):
        control.end(1, upto(-1))
        assert control.enlist(1) == incarnation
    control.end(0, upto(-1))
    assert control.enlist(0) == 1


def test_a_place_holds_one_life_at_a_time():
    control = coordinator()
    control.enlist(0)
    with pytest.raises(AssertionError):
        control.enlist(0)
    control.end(0)
    with pytest.raises(KeyError):
        control.end(0)


@pytest.mark.parametrize("successor", [False, True])
def test_an_ended_life_is_refused(successor):
    control = coordinator()
    stale = control.enlist(0)
    assert control.lease(0, stale) == Lease(0, 4)
    control.report(0, stale, [step(0)])
    assert control.end(0, upto(0)) == 2
    if successor:
        control.enlist(0)
    before = control.progress()
    assert control.lease(0, stale) is None
    control.report(0, stale, [step(1), step(2)])
    assert control.progress() == before
    assert before.num_consumed == 2
    assert before.totals.pushes == 1


def test_lives_that_were_never_enlisted_are_refused():
    control = coordinator()
    control.enlist(0)
    for worker, incarnation in ((1, 0), (0, 1), (0, -1)):
        assert control.lease(worker, incarnation) is None
        control.report(worker, incarnation, [step(0)])
    assert control.progress().totals == Totals()
    assert control.lease(0, 0) == Lease(0, 4)


def test_progress_follows_reports():
    control = coordinator(total=8)
    life = control.enlist(0)
    control.lease(0, life)
    assert control.progress().num_consumed == 0
    control.report(0, life, [step(0)])
    assert control.progress().num_consumed == 2
    control.report(0, life, [])
    control.lease(0, life)
    control.report(0, life, [step(1), step(2)])
    progress = control.progress()
    assert (progress.num_consumed, progress.totals.pushes) == (6, 3)
    assert progress.totals.staleness == {0: 1, 1: 1, 2: 1}
    assert not progress.finished
    assert control.end(0) == 0
    assert control.progress().num_consumed == 8, "done to the last batch"
    assert control.progress().finished


def test_progress_is_a_copy():
    control = coordinator()
    life = control.enlist(0)
    control.lease(0, life)
    control.report(0, life, [step(0)])
    earlier = control.progress()
    control.report(0, life, [step(1)])
    assert earlier.totals.pushes == earlier.totals.outcomes.total() == 1
    earlier.totals.outcomes["applied"] = 99
    assert control.progress().totals.outcomes == {"applied": 2}


def test_silence_is_counted_from_the_last_sign_of_life():
    control = coordinator(total=40)
    clock = control._clock = FakeClock()
    life = control.enlist(3)
    control.enlist(4)
    clock.now_s += 5
    assert control.progress().silent_s == {3: 5, 4: 5}
    control.lease(3, life)
    clock.now_s += 2
    assert control.progress().silent_s == {3: 2, 4: 7}
    clock.now_s += 1
    control.report(3, life, [step(0)])
    clock.now_s += 0.5
    assert control.progress().silent_s == {3: 0.5, 4: 8.5}
    control.end(4, upto(-1))
    assert control.progress().silent_s == {3: 0.5}
    control.enlist(4)
    control.report(4, 0, [step(0)])
    clock.now_s += 1
    assert control.progress().silent_s == {3: 1.5, 4: 1}


def test_work_is_there_for_a_successor():
    control = coordinator(total=4)
    life = control.enlist(0)
    assert control.has_work()
    control.lease(0, life)
    assert not control.has_work()
    assert control.lease(0, life) is None
    assert control.end(0, upto(0)) == 2
    assert control.has_work()
    assert not control.progress().finished
    again = control.enlist(0)
    assert control.lease(0, again) == Lease(2, 4)
    control.end(0)
    assert not control.has_work()
    assert control.progress().finished


def test_a_position_is_of_the_state_and_not_of_what_is_known_since():
    control = coordinator(total=12)
    life = control.enlist(0)
    control.lease(0, life)
    control.report(0, life, [step(0), step(1)])
    control.lease(0, life)
    assert control.progress().num_consumed == 4, "asking for progress forgets nothing"
    assert control.position({}) == Position(8, (Lease(0, 8),))
    assert control.position({0: {life: 0}}) == Position(8, (Lease(2, 8),))
    assert control.position({0: {life: 2}, 5: {0: 9}}) == Position(8, (Lease(6, 8),))
    assert control.progress().num_consumed == 4, "progress is what was reported"


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 20))
def test_a_run_with_deaths_settles_every_sample_once(data, batch_size, lease_batches, num_batches):
    total = batch_size * num_batches
    control = coordinator(total, batch_size, lease_batches)
    lives: dict[int, int] = {}
    batches: dict[int, list[range]] = {}
    pushed: dict[int, int] = {}
    settled: Counter[int] = Counter()
    reported = num_deaths = num_leases = twice = returned = 0
    while not (progress := control.progress()).finished:
        assert progress.num_consumed == settled.total() + sum(
            len(batch) for worker in lives for batch in batches[worker][: pushed[worker]]
        )
        worker = data.draw(st.integers(0, 2))
        if worker not in lives:
            if control.has_work():
                lives[worker], batches[worker] = control.enlist(worker), []
                pushed[worker] = 0
            continue
        if pushed[worker] < len(batches[worker]):
            if num_deaths < 8 and data.draw(st.booleans()):
                num_deaths += 1
                # What was pushed and not reported is settled as well.
                num_done = data.draw(st.integers(pushed[worker], len(batches[worker])))
                some = data.draw(st.integers(num_done, len(batches[worker])))
                twice += sum(map(len, batches[worker][num_done:some]))
                returned += sum(map(len, batches[worker][num_done:]))
                control.end(worker, Settled(num_done - 1, some - 1))
            else:
                control.report(worker, lives[worker], [step(pushed[worker])])
                pushed[worker] += 1
                reported += 1
                continue
        else:
            lease = control.lease(worker, lives[worker])
            if lease is not None:
                num_leases += 1
                parts = lease.batches(batch_size)
                batches[worker] += [range(part.start, part.stop) for part in parts]
                continue
            num_done = pushed[worker]
            control.end(worker)
        settled.update(each for batch in batches[worker][:num_done] for each in batch)
        del lives[worker]
    assert settled == Counter(range(total))
    assert (progress.num_consumed, progress.totals.pushes) == (total, reported)
    totals = progress.totals
    assert (totals.leases, totals.samples_returned) == (num_leases, returned)
    assert totals.samples_twice == twice
    assert set(progress.silent_s) == set(lives), "who came too late for a lease"
    assert not any(batches[worker] for worker in lives)
    assert not control.has_work()


def test_a_closed_run_ends_with_what_is_leased():
    coordinator = Coordinator(Ledger(1000, 8, BatchLeases(8, 2)), Totals())
    life = (0, coordinator.enlist(0))
    lease = coordinator.lease(*life)
    coordinator.close()
    assert not coordinator.has_work()
    assert coordinator.lease(*life) is None
    assert not coordinator.progress().finished, "its lease is still being worked on"
    coordinator.end(0)
    progress = coordinator.progress()
    assert progress.finished
    assert progress.num_consumed == lease.num_samples
    assert progress.totals.samples_returned == 0


def test_what_a_worker_leaves_in_a_closed_run_is_not_handed_out():
    coordinator = Coordinator(Ledger(1000, 8, BatchLeases(8, 2)), Totals())
    coordinator.enlist(0)
    coordinator.lease(0, 0)
    coordinator.close()
    assert coordinator.end(0, Settled(0, 0)) == 8
    assert not coordinator.has_work()
    assert coordinator.progress().finished
    assert coordinator.progress().num_consumed == 8


def test_what_a_worker_gives_back_is_handed_out_to_another():
    control = coordinator(total=8, lease_batches=4)
    leaving, other = control.enlist(0), control.enlist(1)
    assert control.lease(0, leaving) == Lease(0, 8)
    assert control.lease(1, other) is None
    control.report(0, leaving, [step(0)])
    assert control.end(0, upto(0), leaving) == 6
    assert control.lease(0, leaving) is None
    assert control.lease(1, other) == Lease(2, 8)
    assert control.progress().totals.samples_returned == 6


class Crew:
    """Workers that join, push, leave and die, each beside what the coordinator is told of it."""

    def __init__(self, total: int, batch_size: int, lease_batches: int, per_push: int) -> None:
        leases = BatchLeases(batch_size, lease_batches)
        ledger = Ledger(total, batch_size, leases, batches_per_push=per_push)
        self.control = Coordinator(ledger, Totals(), FakeClock())
        self.batch_size, self.per_push = batch_size, per_push
        self.lives: dict[int, int] = {}
        self.batches: dict[int, list[range]] = {}
        self.num_pushed: dict[int, int] = {}
        self.trained: Counter[int] = Counter()

    def join(self, worker: int) -> None:
        self.lives[worker] = self.control.enlist(worker)
        self.batches[worker], self.num_pushed[worker] = [], 0

    def push(self, worker: int) -> bool:
        """One more push, for which leases are taken; False if there is nothing left to do."""
        first = self.num_pushed[worker] * self.per_push
        while len(self.batches[worker]) < first + self.per_push:
            lease = self.control.lease(worker, self.lives[worker])
            if lease is None:
                break
            parts = lease.batches(self.batch_size)
            self.batches[worker] += [range(part.start, part.stop) for part in parts]
        group = self.batches[worker][first : first + self.per_push]
        self.num_pushed[worker] += bool(group)
        return bool(group)

    def end(self, worker: int, *, done: bool) -> None:
        """A life is over: its work is done, or it left or died with so many pushes settled."""
        life, num_pushed = self.lives.pop(worker), self.num_pushed[worker]
        self.control.end(worker, None if done else upto(num_pushed - 1), life)
        for batch in self.batches[worker][: num_pushed * self.per_push]:
            self.trained.update(batch)


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 20))
def test_every_sample_is_trained_on_once_whoever_joins_leaves_or_dies(
    data, batch_size, lease_batches, per_push, num_batches
):
    total = batch_size * num_batches
    crew = Crew(total, batch_size, lease_batches, per_push)
    num_early_ends = 0
    while not crew.control.progress().finished:
        worker = data.draw(st.integers(0, 3))
        if worker not in crew.lives:
            if crew.control.has_work():
                crew.join(worker)
        elif num_early_ends < 10 and data.draw(st.booleans()):
            num_early_ends += 1
            crew.end(worker, done=False)
        elif not crew.push(worker):
            crew.end(worker, done=True)
    assert crew.trained == Counter(range(total))
    assert crew.control.progress().num_consumed == total


def test_a_checkpoint_counts_what_going_on_from_it_would_do_twice():
    """The run that goes on without it does nothing twice, and a death is counted once."""
    control = Coordinator(Ledger(1000, 8, BatchLeases(8, 4)), Totals())
    lives = [(worker, control.enlist(worker)) for worker in range(2)]
    for life in lives:
        control.lease(*life)
    everywhere, somewhere = {0: {0: 0}, 1: {0: 1}}, {0: {0: 2}, 1: {0: 1}}
    position, progress = control.at_cut(everywhere, somewhere)
    assert position == control.position(everywhere)
    assert progress.totals.samples_twice == 16
    assert control.progress().totals.samples_twice == 0
    control.end(0, Settled(0, 2), 0)
    assert control.at_cut(everywhere, somewhere)[1].totals.samples_twice == 16
    control.end(1, Settled(3, 3), 0)
    _, progress = control.at_cut(everywhere, {**somewhere, 1: {0: 3}})
    assert progress.totals.samples_twice == 32, "it ended after the cut"
