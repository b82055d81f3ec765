"""Coordinators that die after any call, while their journal or the answer to a call is lost."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynception import journal as journals
from asynception.coordinator import Coordinator
from asynception.journal import Journal, JournaledCoordinator, JournalLost
from asynception.ledger import BatchLeases, Ledger
from asynception.totals import Totals
from ps.receipts import Settled
from ps.shard import Outcome, Receipt
from worker.step_report import GradientSummary, StepReport

TOTAL, BATCH_SIZE, LEASE_BATCHES = 60, 2, 3


def ledger() -> Ledger:
    return Ledger(TOTAL, BATCH_SIZE, BatchLeases(BATCH_SIZE, LEASE_BATCHES))


def clock() -> float:
    return 7.0


def step(sequence: int) -> StepReport:
    loss = float("nan") if sequence % 5 == 4 else 1.5 + sequence / 7
    receipt = Receipt(Outcome.APPLIED, sequence + 1, sequence % 3, 0.1)
    return StepReport(sequence, 2, (f"key {sequence}",), GradientSummary(loss, 2.0), (receipt,))


class Callers:
    """Three workers, and who supervises them: what they would ask of a coordinator next."""

    def __init__(self, draw) -> None:
        self._draw = draw
        self.lives: dict[int, int] = {}
        self._born: dict[int, int] = {}
        self._batches: dict[int, int] = {}
        self._leases: dict[int, int] = {}
        self._reported: dict[int, int] = {}
        self.settled: dict[int, dict[int, int]] = {}
        """By worker and life, the newest push that all shards have."""

    def next_call(self):
        worker = self._draw(st.integers(0, 2))
        if worker not in self.lives:
            return "enlist", (worker, self._born.get(worker, -1) + 1)
        life = (worker, self.lives[worker])
        kinds = ["lease", "report", "report", "end", "die", "progress", "position"]
        kind = self._draw(st.sampled_from(kinds))
        reported = self._reported[worker]
        match kind:
            case "lease":
                return "lease", (*life, self._leases[worker])
            case "report":
                last = self._draw(st.integers(reported, self._batches[worker]))
                first = self._draw(st.integers(0, reported))
                return "report", (*life, [step(each) for each in range(first, last)])
            case "end" if reported == self._batches[worker]:
                return "end", (worker, None, life[1])
            case "die":
                done = self._draw(st.integers(reported, self._batches[worker]))
                some = self._draw(st.integers(done, self._batches[worker]))
                return "end", (worker, Settled(done - 1, some - 1), life[1])
            case "position":
                return "position", ({w: dict(lives) for w, lives in self.settled.items()},)
        return "progress", ()

    def take(self, name, arguments, answer) -> None:
        worker = arguments[0] if arguments else -1
        if name == "enlist":
            self.lives[worker] = self._born[worker] = answer
            self._batches[worker] = self._leases[worker] = self._reported[worker] = 0
        elif name == "lease" and answer is not None:
            self._leases[worker] += 1
            self._batches[worker] += answer.num_batches(BATCH_SIZE)
        elif name == "report":
            self._reported[worker] = answer
            self.settled.setdefault(worker, {})[self.lives[worker]] = answer - 1
        elif name == "end":
            settled = arguments[1]
            last = self._batches[worker] - 1 if settled is None else settled.everywhere
            self.settled.setdefault(worker, {})[self.lives.pop(worker)] = last


@settings(max_examples=60)
@given(st.data())
def test_a_successor_is_what_the_dead_one_was_after_any_calls(data):
    """Its callers notice nothing, and a coordinator that never dies says the same."""
    with TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal")
        journal.create()
        control = JournaledCoordinator(ledger(), Totals(), journal, clock)
        immortal = Coordinator(ledger(), Totals(), clock)
        callers, num_deaths = Callers(data.draw), 0
        for _ in range(data.draw(st.integers(0, 30))):
            name, arguments = callers.next_call()
            answer = getattr(control, name)(*arguments)
            if data.draw(st.sampled_from([False, False, True])):
                num_deaths += 1
                control = JournaledCoordinator(ledger(), Totals(), Journal(journal._path), clock)
                if data.draw(st.booleans()):  # nobody got the answer
                    assert same(getattr(control, name)(*arguments), answer)
            assert same(getattr(immortal, name)(*arguments), answer)
            callers.take(name, arguments, answer)
        expected, found = immortal.progress(), control.progress()
        assert vars(found) == {**vars(expected), "coordinator_deaths": num_deaths}
        assert control.position(callers.settled) == immortal.position(callers.settled)
        assert set(control._alive) == set(immortal._alive) == set(callers.lives)


def same(answer, expected) -> bool:
    """Of two coordinators, one of which may know of deaths of its predecessors."""
    if hasattr(expected, "coordinator_deaths"):
        apart = {"coordinator_deaths": 0}
        return {**vars(answer), **apart} == {**vars(expected), **apart}
    return answer == expected


@settings(max_examples=50)
@given(st.integers(0, 12), st.integers(0, 10_000))
def test_a_call_that_a_death_cut_short_was_never_made(num_calls, cut):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        journal = Journal(path)
        journal.create()
        control = JournaledCoordinator(ledger(), Totals(), journal, clock)
        control.enlist(0, 0)
        states, sizes = [control.state()], [path.stat().st_size]
        for number in range(num_calls):
            control.lease(0, 0, number)
            control.report(0, 0, [step(number)])
            states.append(control.state())
            sizes.append(path.stat().st_size)
        cut = sizes[0] + cut % (sizes[-1] - sizes[0] + 1)
        os.truncate(path, cut)
        successor = JournaledCoordinator(ledger(), Totals(), Journal(path), clock)
        leased = successor._ledger.num_batches(0, 0)
        if cut in sizes:
            state = states[sizes.index(cut)]
            assert successor.state() == {**state, "num_deaths": 1}
        whole = max(n for n, size in enumerate(sizes) if size <= cut)
        assert states[whole]["_sequences"] == successor._sequences
        assert leased in (
            LEASE_BATCHES * min(whole, 10),
            LEASE_BATCHES * min(whole + 1, 10),
        )


def test_a_long_journal_begins_again_with_what_it_came_to(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "MAX_NUM_BYTES", 5000)
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.create()
    control = JournaledCoordinator(ledger(), Totals(), journal, clock)
    control.enlist(0, 0)
    control.lease(0, 0, 0)
    for number in range(300):
        control.report(0, 0, [step(number)])
    assert path.stat().st_size < 12_000
    successor = JournaledCoordinator(ledger(), Totals(), Journal(path), clock)
    assert successor.state() == {**control.state(), "num_deaths": 1}


def test_a_record_that_was_damaged_ends_the_journal(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.create()
    journal.begin({"a": 1})
    sizes = []
    for worker in range(3):
        journal.append(("enlist", (worker, 0)))
        sizes.append(path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[sizes[1] - 3] ^= 1
    path.write_bytes(content)
    assert Journal(path).read() == ({"a": 1}, [("enlist", (0, 0))])


def test_whoever_dies_while_a_journal_begins_again_leaves_the_old_one_whole(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.create()
    journal.begin({"a": 1})
    journal.append(("close", ()))
    (tmp_path / "as-opened").hardlink_to(path)
    journal.begin({"a": 2})
    journal.append(("enlist", (1, 0)))
    assert Journal(tmp_path / "as-opened").read() == ({"a": 1}, [("close", ())])
    assert Journal(path).read() == ({"a": 2}, [("enlist", (1, 0))])


def test_what_is_neither_leased_nor_reported_is_remembered_too(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.create()
    control = JournaledCoordinator(ledger(), Totals(), journal, clock)
    control.published(48)
    assert control.has_work()
    control.close()
    successor = JournaledCoordinator(ledger(), Totals(), Journal(path), clock)
    assert successor.progress().num_published == 48
    assert not successor.has_work()


def test_a_journal_that_cannot_be_written_is_not_come_back_to(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.create()
    control = JournaledCoordinator(ledger(), Totals(), journal, clock)
    with Path("/dev/full").open("ab", buffering=0) as full:
        journal._file = full
        assert control.enlist(0, 0) == 0
        assert control.lease(0, 0, 0) is not None, "it goes on without"
    with pytest.raises(JournalLost):
        JournaledCoordinator(ledger(), Totals(), Journal(path), clock)


def test_a_life_that_has_ended_is_told_that_nobody_wants_its_steps():
    control = Coordinator(ledger(), Totals(), clock)
    control.enlist(0, 0)
    control.lease(0, 0, 0)
    assert control.report(0, 0, [step(0)]) == 1
    control.end(0, Settled(0, 0), 0)
    assert control.report(0, 0, [step(1)]) is None


READS = {
    "progress",
    "has_work",
    "position",
    "at_cut",
    "num_samples_twice",
    "state",
    "restore",
    "num_deaths",
}
"""Of a coordinator: they change nothing that a successor must know."""

NOT_KEPT = {"_ledger", "_clock", "_alive"}
"""Its parts that have a state of their own, or are the process's."""


def test_every_call_that_changes_something_is_in_the_journal():
    public = {name for name in vars(Coordinator) if not name.startswith("_")}
    assert public - READS == {n for n in vars(JournaledCoordinator) if not n.startswith("_")}
    control = Coordinator(ledger(), Totals(), clock)
    assert set(vars(control)) - NOT_KEPT == set(control.state()) - {"alive", "ledger"}
    built = {"total_samples", "_batches_per_push", "_batch_size", "_lease_end"}
    assert set(vars(ledger())) - built == set(ledger().state())
