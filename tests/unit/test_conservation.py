"""No update is lost or doubled, in any mode, whatever arrives when.

With gradients of ones, SGD and a learning rate of 1, parameters are the start less the number of
pushes whose receipt says applied.
"""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from policy_shards import NUM_PARAMETERS, parameters_of, push_of, shard_of

from ps.consistency import Async, Averaging, Bounded, Elastic, Sync
from ps.shard import Outcome

WORKERS, START = 3, 1000.0
POLICIES = [
    Async(),
    Async(max_staleness=2),
    Bounded(slack=0),
    Bounded(slack=2),
    Sync(),
    Sync(backup_workers=1),
    Sync(deterministic=True),
    Averaging(local_steps=1),
    Averaging(local_steps=1, asynchronous=True, outer_lr=WORKERS),
    Elastic(),
]
BAD = torch.full((NUM_PARAMETERS,), torch.inf, dtype=torch.float64)

workers = st.integers(0, WORKERS - 1)


class AnyArrival(RuleBasedStateMachine):
    """Workers that pull, push, push again, die, end, and send from lives that are over."""

    @initialize(policy=st.sampled_from(POLICIES))
    def begin(self, policy):
        self.shard = shard_of(policy, WORKERS, start=START)
        self.life = dict.fromkeys(range(WORKERS), 0)
        self.sequence = dict.fromkeys(range(WORKERS), 0)
        self.pulled = dict.fromkeys(range(WORKERS), 0)
        self.at_work = set(range(WORKERS))
        self.receipts = {}
        self.made_by_leaving = 0

    def push(self, worker, gradient=None):
        key = worker, self.life[worker], self.sequence[worker]
        self.sequence[worker] += 1
        version = self.pulled[worker]
        self.receipts[key] = version, self.send(key, version, gradient)
        assert self.receipts[key][1].outcome is not Outcome.FENCED

    def send(self, key, version, gradient=None):
        worker, life, sequence = key
        return self.shard.push(push_of(worker, sequence, version, gradient, incarnation=life))

    @rule(worker=workers)
    def pull(self, worker):
        if self.shard.may_pull(worker):
            snapshot = self.shard.pin(worker)
            self.pulled[worker] = snapshot.version
            self.shard.release(snapshot)

    @rule(worker=workers)
    def push_ones(self, worker):
        self.push(worker)

    @rule(worker=workers)
    def push_what_is_not_finite(self, worker):
        self.push(worker, BAD)
        assert next(reversed(self.receipts.values()))[1].outcome is Outcome.NOT_FINITE

    @precondition(lambda self: self.receipts)
    @rule(data=st.data())
    def push_again(self, data):
        """Of a life that is over, fenced; of the present one, the first receipt."""
        key = data.draw(st.sampled_from(sorted(self.receipts)[-12:]))
        version, first = self.receipts[key]
        receipt = self.send(key, version)
        if key[1] < self.life[key[0]]:
            assert receipt.outcome is Outcome.FENCED
        else:
            assert receipt == first

    @rule(worker=workers, enters=st.booleans())
    def die(self, worker, enters):
        self.life[worker] += 1
        self.sequence[worker] = 0
        self.shard.fence(worker, self.life[worker])
        if enters:
            self.shard.enter(worker, self.life[worker])
            self.at_work.add(worker)

    @precondition(lambda self: len(self.at_work) > 1)
    @rule(data=st.data())
    def end(self, data):
        """What the others wait for no longer may make a version, of which no receipt says so."""
        self.at_work.remove(data.draw(st.sampled_from(sorted(self.at_work))))
        before = self.shard.version
        self.shard.expect(set(self.at_work))
        self.made_by_leaving += self.shard.version - before

    @invariant()
    def parameters_say_how_many_were_applied(self):
        said = [receipt.outcome for _, receipt in self.receipts.values()]
        applied = said.count(Outcome.APPLIED) + self.made_by_leaving
        assert self.shard.version == self.shard.settled[Outcome.APPLIED] == applied
        assert (parameters_of(self.shard) - (START - applied)).abs().max() < 1e-9
        state = self.shard.capture(["statistics"])
        assert (state.vectors["statistics"] - applied).abs().max() < 1e-9


AnyArrival.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)
TestAnyArrival = AnyArrival.TestCase
