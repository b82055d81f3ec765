"""What must hold at every step and at the end, worked out beside the run from its pushes alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asynception.ledger import Position
from asynception.salvage import Remains
from asynception.simulate.scenario import Scenario
from asynception.simulate.shard_watch import Counts, Key, Life, LifeKey, Newest, ShardWatch
from asynception.simulate.wait_watch import WaitWatch
from asynception.simulate.world import Violation
from asynception.totals import Totals
from ps.messages import WorkerSequences
from ps.receipts import Outcome, Settled
from ps.shard import ShardState


@dataclass
class Saved:
    """What was known when a checkpoint was written."""

    counts: Sequence[Counts]
    """By shard."""
    declared: Counts
    samples_twice: int
    updates_lost: Counter[int]
    """By shard."""


@dataclass
class Cut:
    """What the coordinator was told of a checkpoint's state, and what must be counted then."""

    everywhere: WorkerSequences
    somewhere: WorkerSequences
    declared: Counts
    samples_twice: int


class Watch:
    """The whole run."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.session = -1
        self.shards: dict[str, ShardWatch] = {}
        """By the address where each is served first, in order."""
        self._servers: dict[str, ShardWatch] = {}
        """By the address of each server that has the shard, or is a standby."""
        self.waits = WaitWatch()
        self.lives: dict[LifeKey, Life] = {}
        self._held_to: dict[LifeKey, int] = {}
        """By life that died, the newest push that counts as its own; what came after is others'."""
        self._zeros = np.zeros(scenario.total_samples, np.int64)
        self._begin = Saved(
            [self._zeros] * scenario.config.scaling.num_servers, self._zeros.copy(), 0, Counter()
        )
        self.declared = self._zeros.copy()
        """How many times each sample may have been trained on too often."""
        self.samples_twice = 0
        self.updates_lost = Counter[int]()
        self._cut: Cut | None = None
        self.num_checkpoints = self.num_settled = self.num_salvages = 0

    def begin_session(self, origin: Saved | None) -> None:
        """Shards start anew from a checkpoint's state, or from nothing."""
        self.session += 1
        self._begin = origin or Saved(
            [self._zeros] * self.scenario.config.scaling.num_servers,
            self._zeros.copy(),
            0,
            Counter(),
        )
        self.num_settled += sum(len(shard.settled) for shard in self.shards.values())
        for shard in self.shards.values():
            shard.is_over = True
        self.shards, self._servers, self.lives, self._held_to = {}, {}, {}, {}
        self.declared = self._begin.declared.copy()
        self.samples_twice = self._begin.samples_twice
        self.updates_lost = self._begin.updates_lost.copy()

    def add_server(self, address: str, shard: int) -> ShardWatch:
        """A server starts; the first one of a shard has it, later ones are its standbys."""
        if shard < len(self.shards):
            watch = list(self.shards.values())[shard]
        else:
            watch = ShardWatch(self.scenario, address, self._begin.counts[shard], self._samples_of)
            self.shards[address] = watch
        self._servers[address] = watch
        return watch

    def at(self, address: str) -> ShardWatch | None:
        """The shard that a server has; None for one of a session that is over."""
        return self._servers.get(address)

    def _samples_of(self, key: Key) -> Counts:
        worker, incarnation, sequence = key
        counts = self._zeros.copy()
        for positions in self.lives[worker, incarnation].groups.get(sequence, []):
            counts[positions.start : positions.stop] += 1
        return counts

    def bury(self, worker: int, incarnation: int, settled: Settled) -> None:
        """A life has died: pushes that some shards have, and not all, are done again."""
        self._held_to[worker, incarnation] = settled.everywhere
        again = self._between((worker, incarnation), settled.everywhere, settled.somewhere)
        self.declared += again
        self.samples_twice += int(again.sum())

    def _between(self, life: LifeKey, everywhere: int, somewhere: int) -> Counts:
        """How often each sample is in a life's pushes after one of them, up to another."""
        counts = self._zeros.copy()
        if life in self.lives:
            for sequence in range(everywhere + 1, somewhere + 1):
                counts += self._samples_of((*life, sequence))
        return counts

    def _again(self, parts: Sequence[Newest], all_of: Sequence[Newest]) -> Counts:
        """What is done again: pushes that one of these parts has, and not all of those."""
        counts = self._zeros.copy()
        for life in self.lives:
            least = min(newest.get(life, -1) for newest in all_of)
            most = max(newest.get(life, -1) for newest in (*parts, *all_of))
            counts += self._between(life, least, min(most, self._held_to.get(life, most)))
        return counts

    def note_cut(self, everywhere: WorkerSequences, somewhere: WorkerSequences) -> None:
        """The coordinator is asked of a state now."""
        again = self._again([_by_life(somewhere)], [_by_life(everywhere)])
        samples_twice = self.samples_twice + int(again.sum())
        self._cut = Cut(everywhere, somewhere, self.declared + again, samples_twice)

    def _check_cut(self, states: Sequence[ShardState], samples_twice: int) -> Cut:
        """It was told of these states."""
        cut, newest = self._cut, [_by_life(state.last_sequences) for state in states]
        assert cut is not None, "a checkpoint that the coordinator was not asked of"
        told = self._again([_by_life(cut.somewhere)], [_by_life(cut.everywhere)])
        if not np.array_equal(told, self._again([], newest)):
            raise Violation("the coordinator was told of another state")
        if samples_twice != cut.samples_twice:
            raise Violation(f"a checkpoint says {samples_twice} twice, not {cut.samples_twice}")
        return cut

    def _open(self, position: Position) -> npt.NDArray[np.bool_]:
        """What a position says is yet to be trained on."""
        is_open = np.arange(self.scenario.total_samples) >= position.frontier
        for lease in position.open:
            is_open[lease.start : lease.stop] = True
        return is_open

    def save(self, position: Position, states: Sequence[ShardState], samples_twice: int) -> Saved:
        """A checkpoint is written of these states, and says that so much is done twice."""
        self.num_checkpoints += 1
        shards = list(self.shards.values())
        counts = [
            shard.counts(state.last_sequences) for shard, state in zip(shards, states, strict=True)
        ]
        for shard, state in zip(shards, states, strict=True):
            vectors = state.vectors
            shard.check_version(state.clocks.updates, vectors["parameters"], vectors["statistics"])
        self._check_position(position, counts)
        cut = self._check_cut(states, samples_twice)
        return Saved(counts, cut.declared, cut.samples_twice, self.updates_lost.copy())

    def salvage(self, remains: Remains) -> Saved:
        """A session begins with what is left of this one. Live shards must have lost nothing."""
        self.num_salvages += 1
        shards, copy, counts = list(self.shards.values()), remains.copy, []
        for number, shard in enumerate(shards):
            if number in remains.states:
                state = remains.states[number]
                if state.clocks.updates != shard.version:
                    raise Violation(f"{shard.address} was salvaged without its newest updates")
                vectors = [state.vectors[name] for name in ("parameters", "statistics")]
                shard.check_version(shard.version, *vectors)
                counts.append(shard.counts_without_sum())
            else:
                shard.check_version(copy.version, copy.parameters, copy.statistics)
                counts.append(shard.counts_at(copy.version))
        others = np.min(np.stack([counts[number] for number in remains.states]), axis=0)
        self._check_position(remains.position, [others])
        lacking = ~self._open(remains.position) & (counts[remains.shard] < 1)
        counts[remains.shard] += lacking  # what is lost is not trained on again
        self._check_lost(remains, [shards[number].version for number in remains.states])
        self._check_twice_in(remains)
        return Saved(counts, self.declared.copy(), self.samples_twice, self.updates_lost.copy())

    def _check_twice_in(self, remains: Remains) -> None:
        """Said to be done again are the pushes that a part has, and not all live shards' have."""
        shards = list(self.shards.values())
        others = [shards[number].newest() for number in remains.states]
        of_copy = shards[remains.shard].newest_at(remains.copy.version)
        again = self._again([of_copy], others)
        num_samples = int(again.sum())
        self.declared += again
        self.samples_twice += num_samples
        if remains.samples_twice != num_samples:
            raise Violation(
                f"{remains.samples_twice} samples are said to be done again, not {num_samples}"
            )

    def _check_lost(self, remains: Remains, versions: Sequence[int]) -> None:
        """Said to be lost are the updates by which the copy is behind all others' versions."""
        lost = max(0, min(versions) - remains.copy.version)
        if remains.updates_lost != lost:
            raise Violation(f"{remains.updates_lost} updates are said to be lost, not {lost}")
        if lost:
            self.updates_lost[remains.shard] += lost

    def _check_position(self, position: Position, counts: Sequence[Counts]) -> None:
        is_open, least = self._open(position), np.min(np.stack(list(counts)), axis=0)
        lost = np.flatnonzero(~is_open & (least < 1) & ~self._corrupt())
        if lost.size:
            raise Violation(f"a checkpoint's position counts {lost.tolist()}, its state doesn't")
        again = np.flatnonzero(is_open & (least > self.declared))
        if again.size:
            raise Violation(f"a checkpoint's state holds {again.tolist()}, to be done again")

    def _corrupt(self) -> npt.NDArray[np.bool_]:
        corrupt = np.zeros(self.scenario.total_samples, bool)
        corrupt[list(self.scenario.corrupt)] = True
        return corrupt

    def check_twice(self, totals: Totals) -> None:
        """The coordinator counts these at this moment."""
        if totals.samples_twice != self.samples_twice:
            raise Violation(f"samples_twice = {totals.samples_twice}, not {self.samples_twice}")

    def check_end(self, totals: Totals) -> None:
        """The run has come to its end, with these totals."""
        for shard in self.shards.values():
            shard.check_end()
            counts = shard.counts()
            lost = np.flatnonzero((counts < 1) & ~self._corrupt())
            if lost.size:
                raise Violation(f"{shard.address}: {lost.tolist()} were never settled")
            doubled = np.flatnonzero(counts > 1 + self.declared)
            if doubled.size:
                raise Violation(f"{shard.address}: {doubled.tolist()} were counted too often")
        self.check_twice(totals)
        if totals.updates_lost != self.updates_lost:
            raise Violation(f"updates_lost = {totals.updates_lost}, not {self.updates_lost}")
        if self.session == 0:
            self._check_outcomes(totals.outcomes)

    def _check_outcomes(self, outcomes: Mapping[str, int]) -> None:
        for outcome in (Outcome.STALE, Outcome.NOT_FINITE):
            settled = [each for shard in self.shards.values() for each in shard.settled.values()]
            found, said = settled.count(outcome), outcomes.get(outcome.value, 0)
            if found != said:
                raise Violation(f"{found} pushes were {outcome.value}, and {said} are counted")


def _by_life(sequences: WorkerSequences) -> Newest:
    """The same by worker and incarnation."""
    return {
        (worker, life): last for worker, each in sequences.items() for life, last in each.items()
    }
