"""Rounds of synchronous workers: nobody waits for ever, whoever dies between two shards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_shards import RecordingClient
from planted_bugs import count_rounds_shard_by_shard
from policy_shards import NUM_PARAMETERS, parameters_of, push_of, shard_of
from torch import nn

from model.flat import FlatModule
from ps.consistency import Sync
from ps.receipts import Receipt
from ps.shard import Outcome
from worker.gradient import GradientComputer
from worker.objective import create_objective
from worker.pipeline import Pipeline, PipelineSettings
from worker.rounds import Rounds

NAN = torch.full((NUM_PARAMETERS,), torch.nan, dtype=torch.float64)


def receipt_of(outcome):
    return Receipt(outcome, 0, 0, 1.0)


@pytest.mark.parametrize(
    ("outcomes", "next_round"),
    [
        ((Outcome.APPLIED, Outcome.ACCUMULATED), 4),
        ((Outcome.STALE, Outcome.ACCUMULATED), 4),
        ((Outcome.STALE, Outcome.STALE), 4),
        ((Outcome.NOT_FINITE, Outcome.NOT_FINITE), 3),
        ((Outcome.APPLIED, Outcome.NOT_FINITE), 3),
        ((Outcome.FENCED, Outcome.APPLIED), 3),
    ],
)
def test_a_round_is_the_lowest_version_and_done_when_no_shard_lacks_its_push(outcomes, next_round):
    rounds = Rounds(2)
    assert rounds.begin([3, 5]) == [3, 3]
    rounds.end([receipt_of(outcome) for outcome in outcomes])
    assert rounds.at_least == [next_round, next_round]


def test_a_push_names_its_round_and_what_is_held_its_version():
    """What was pulled of a shard that is ahead can still stand in for what that shard loses."""
    flat = FlatModule(nn.Linear(4, 4))
    client = RecordingClient(flat, 2)  # their versions are 0 and 1
    kept = torch.full_like(flat.parameters, 7.0), flat.statistics.clone()
    computer = GradientComputer(flat, create_objective("multilabel", 4), None)
    pipeline = Pipeline(0, 0, computer, client, PipelineSettings(), True, lambda: kept, print)
    outgoing = pipeline.open(0, pipeline.enter(), 1)
    held = [pipeline.holdings.copy(shard) for shard in range(2)]
    assert [copy.version for copy in held] == [0, 1]
    assert all((copy.parameters == 7).all() for copy in held)
    pipeline.hand_over(outgoing)
    pipeline.settle(outgoing)
    pipeline.close()
    assert [shard.pushes[0].pulled_version for shard in client.shards] == [0, 0]


class _Life:
    """A worker between its calls; `todo` are the shards that it has yet to call."""

    def __init__(self, worker, incarnation, num_shards):
        self.worker, self.incarnation, self.sequence = worker, incarnation, 0
        self.everywhere = frozenset(range(num_shards))
        self.state, self.todo = "pull", set(self.everywhere)
        self.rounds = Rounds(num_shards)
        self.found, self.receipts, self.spoilt = {}, {}, False

    def in_order(self, by_shard):
        return [by_shard[shard] for shard in sorted(self.everywhere)]

    def turn(self, state):
        self.state, self.todo = state, set(self.everywhere)


class _Cluster:
    """Shards and those who call them: each call goes its own way, and may take its time."""

    def __init__(self, num_workers, backup_workers, num_shards):
        policy = Sync(backup_workers=backup_workers)
        self.shards = [shard_of(policy, num_workers, start=0.0) for _ in range(num_shards)]
        self.lives = {w: _Life(w, 0, num_shards) for w in range(num_workers)}
        self.left = []
        """Pushes of dead lives that are still under way."""

    def possible(self):
        """Calls that can be made now, without those of the dead."""
        return [(life, s) for life in self.lives.values() for s in life.todo if self.may(life, s)]

    def may(self, life, s):
        return life.state != "pull" or self.shards[s].version >= life.rounds.at_least[s]

    def call(self, life, s):
        getattr(self, life.state)(life, self.shards[s], s)
        life.todo.discard(s)
        if not life.todo:
            getattr(self, f"after_{life.state}")(life)

    def pull(self, life, shard, s):
        life.found[s] = shard.version

    def after_pull(self, life):
        life.pulled = life.rounds.begin(life.in_order(life.found))
        life.turn("push")

    def push(self, life, shard, s):
        gradient = NAN if life.spoilt else None
        life.receipts[s] = shard.push(
            push_of(life.worker, life.sequence, life.pulled[s], gradient, 4, life.incarnation)
        )

    def after_push(self, life):
        life.rounds.end(life.in_order(life.receipts))
        life.sequence += 1
        life.turn("pull")

    def fence(self, life, shard, s):
        shard.fence(life.worker, life.incarnation)

    def after_fence(self, life):
        life.turn("pull")

    def die(self, life):
        """At any time, with a push settled here and not there; noticed later, shard by shard."""
        if life.state == "push":
            self.left += [(life, s) for s in life.todo]
        after = _Life(life.worker, life.incarnation + 1, len(self.shards))
        after.turn("fence")
        self.lives[life.worker] = after

    def end(self, life):
        del self.lives[life.worker]
        for shard in self.shards:
            shard.expect(set(self.lives))


SKEWED = """0 pull 0, 0 pull 1, 0 push 0, 0 die, 0 pull 0, 0 pull 1, 0 push 1, 0 die, 0 pull 0,
1 pull 0, 1 pull 1, 1 push 0, 1 die, 1 pull 0, 1 pull 1, 1 push 0, 1 push 1,
0 pull 1, 0 push 0, 0 push 1, 0 pull 0, 1 pull 1"""
"""What two workers do at two shards, until one life is ahead at either."""


def waiting_after(calls):
    """Whether all wait after these calls; one that can't be made is left out."""
    cluster = _Cluster(2, 0, 2)
    for call in calls.replace("\n", " ").split(", "):
        worker, what, *shard = call.split()
        life = cluster.lives[int(worker)]
        if what == "die":
            cluster.die(life)
            for s in range(2):
                cluster.call(cluster.lives[int(worker)], s)
        elif life.state == what and (life, int(shard[0])) in cluster.possible():
            cluster.call(life, int(shard[0]))
    return not cluster.possible()


def test_lives_that_are_ahead_at_different_shards_do_not_wait_for_each_other():
    assert not waiting_after(SKEWED)
    with count_rounds_shard_by_shard():
        assert waiting_after(SKEWED)


def play(data, num_calls):
    """Any shards, backup workers, order of calls, deaths, ends, and gradients of NaNs."""
    num_workers, num_shards = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    cluster = _Cluster(num_workers, data.draw(st.integers(0, num_workers - 1)), num_shards)
    rarely = st.integers(0, 11).map(lambda drawn: drawn == 11)
    for _ in range(data.draw(st.integers(0, num_calls))):
        possible = cluster.possible()
        assert possible, "all wait"
        life, s = data.draw(st.sampled_from(possible))
        if life.state == "pull":
            life.spoilt = data.draw(rarely)
        cluster.call(life, s)
        if cluster.left and data.draw(rarely):
            cluster.push(*_at(cluster, cluster.left.pop()))
        if data.draw(rarely):
            cluster.die(life)
        elif len(cluster.lives) > 1 and life.state == "pull" and data.draw(rarely):
            cluster.end(life)
    return cluster


def _at(cluster, call):
    life, s = call
    return life, cluster.shards[s], s


@given(st.data())
@settings(deadline=None)
def test_workers_never_all_wait_for_one_another(data):
    cluster = play(data, num_calls=150)
    target = max(shard.version for shard in cluster.shards) + 2
    for _ in range(30 * len(cluster.lives) * len(cluster.shards)):
        if min(shard.version for shard in cluster.shards) >= target:
            break
        for life, s in cluster.possible():
            if s in life.todo and cluster.may(life, s):
                life.spoilt = False
                cluster.call(life, s)
    assert min(shard.version for shard in cluster.shards) >= target, "work goes round in circles"
    for shard in cluster.shards:
        assert (parameters_of(shard) == -shard.version).all()
