"""Bounded staleness: clocks, who may go on, and that there is always someone who may."""

import threading
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_shards import NUM_PARAMETERS, parameters_of, push_of, shard_of

from ps.consistency import Async, Bounded
from ps.pace import Pace
from ps.schedule import Constant
from ps.service import ShardService
from ps.shard import Outcome, ShardConfig, initial_state

DEADLINE_S, FOREVER_S = 60.0, 3600.0
NAN = torch.full((NUM_PARAMETERS,), torch.nan, dtype=torch.float64)


def cycle(shard, worker, sequence, incarnation=0):
    """Pull and push, if the worker may."""
    assert shard.may_pull(worker)
    snapshot = shard.pin(worker)
    shard.release(snapshot)
    push = push_of(worker, sequence, snapshot.version, incarnation=incarnation)
    return shard.push(push)


@pytest.mark.parametrize("slack", [0, 1, 3])
def test_the_fastest_gets_so_far_ahead_and_no_further(slack):
    shard = shard_of(Bounded(slack=slack), 2)
    for sequence in range(slack + 1):
        assert cycle(shard, 0, sequence).outcome is Outcome.APPLIED
    assert not shard.may_pull(0)
    assert shard.may_pull(1)
    assert shard.may_pull(None), "who isn't a worker never waits"
    cycle(shard, 1, 0)
    assert shard.may_pull(0)
    cycle(shard, 0, slack + 1)
    assert not shard.may_pull(0)


def test_a_gradient_of_nans_is_a_clock_as_well():
    shard = shard_of(Bounded(slack=0), 2)
    cycle(shard, 0, 0)
    assert shard.push(push_of(1, 0, 0, NAN)).outcome is Outcome.NOT_FINITE
    assert shard.may_pull(0)
    assert shard.may_pull(1)


def test_a_repeated_push_is_no_clock():
    shard = shard_of(Bounded(slack=1), 2)
    for _ in range(5):
        assert shard.push(push_of(0, 0, 0)).outcome is Outcome.APPLIED
    assert shard.may_pull(0)


def test_the_dead_and_those_who_are_done_hold_nobody_up():
    shard = shard_of(Bounded(slack=0), 3)
    cycle(shard, 0, 0)
    assert not shard.may_pull(0)
    shard.fence(1, 1)
    assert not shard.may_pull(0), "2 is still at work"
    shard.expect({0, 1})
    assert shard.may_pull(0), "2 is done, and 1 has not come back yet"
    for sequence in range(1, 5):
        cycle(shard, 0, sequence)
    assert shard.enter(1, 1) == 5, "it begins at the slowest one's clock"
    cycle(shard, 0, 5)
    assert not shard.may_pull(0)
    assert shard.push(push_of(1, 9, 0)).outcome is Outcome.FENCED
    assert not shard.may_pull(0), "what a former life sends is no clock"
    cycle(shard, 1, 0, incarnation=1)
    assert shard.may_pull(0)


def test_a_life_that_does_not_enter_is_at_work_from_its_first_push_on():
    shard = shard_of(Bounded(slack=1), 2)
    for sequence in range(2):
        for worker in (0, 1):
            cycle(shard, worker, sequence)
    shard.fence(1, 1)
    for sequence in range(2, 9):
        cycle(shard, 0, sequence)
    assert shard.may_pull(1), "which may be a pull of the former life"
    cycle(shard, 0, 9)
    cycle(shard, 1, 0, incarnation=1)
    allowed = [shard.may_pull(0) for n in (10, 11, 12) if cycle(shard, 0, n)]
    assert allowed == [True, True, False]
    shard.expect({0})
    assert shard.may_pull(0)
    assert shard.may_pull(1), "it is over for this one, but nothing is gained by its waiting"
    assert shard.may_pull(0), "and it is not waited for again"


def test_who_comes_back_when_nobody_is_left_computes_from_the_newest():
    shard = shard_of(Bounded(slack=0), 2)
    shard.push(push_of(0, 0, 0))
    for worker in (0, 1):
        shard.fence(worker, 1)
    assert shard.enter(0, 1) == 0
    assert shard.enter(0, 1, 4) == 4, "another shard was further"
    assert cycle(shard, 0, 0, incarnation=1).staleness == 0


def test_without_any_worker_the_clock_stands_still():
    pace = Pace(range(2), 0)
    pace.tick(0)
    pace.tick(1)
    pace.keep_only(())
    assert pace.floor == 1
    assert pace.enter(1) == 1


class _Life:
    """A worker between its calls; `calls` are what it does next, at each shard by itself."""

    def __init__(self, worker, incarnation, num_shards):
        self.worker, self.incarnation = worker, incarnation
        self.state = "propose" if incarnation else "pull"
        self.sequence, self.todo = -1, set(range(num_shards))
        self.pulled, self.proposed = {}, []
        self.everywhere = frozenset(self.todo)

    def on(self, state):
        self.state, self.todo = state, set(self.everywhere)


class _Cluster:
    """Shards, their callers, and a model of each shard's clocks."""

    def __init__(self, num_workers, num_shards, slack):
        self.slack = slack
        policy = Bounded(slack=slack)
        self.shards = [shard_of(policy, num_workers, start=0.0) for _ in range(num_shards)]
        self.lives = {w: _Life(w, 0, num_shards) for w in range(num_workers)}
        self.clocks = [dict.fromkeys(range(num_workers), 0) for _ in range(num_shards)]
        self.applied = [0] * num_shards

    def possible(self):
        return [
            (life, j)
            for life in self.lives.values()
            for j in sorted(life.todo)
            if life.state != "pull" or self.shards[j].may_pull(life.worker)
        ]

    def call(self, life, j, gradient):
        getattr(self, life.state)(life, self.shards[j], j, gradient)
        life.todo.discard(j)
        following = {"fence": "propose", "propose": "enter", "enter": "pull", "pull": "push"}
        if not life.todo:
            life.sequence += life.state == "pull"
            life.on(following.get(life.state, "pull"))

    def fence(self, life, shard, j, _):
        shard.fence(life.worker, life.incarnation)
        self.clocks[j].pop(life.worker, None)

    def propose(self, life, shard, j, _):
        life.proposed.append(shard.enter(life.worker, life.incarnation))
        self.clocks[j][life.worker] = life.proposed[-1]

    def enter(self, life, shard, j, _):
        clock = shard.enter(life.worker, life.incarnation, max(life.proposed))
        assert clock == max(life.proposed), "the same at all shards"
        self.clocks[j][life.worker] = clock

    def pull(self, life, shard, j, _):
        clocks = self.clocks[j]
        assert clocks[life.worker] - min(clocks.values()) <= self.slack
        snapshot = shard.pin(life.worker)
        life.pulled[j] = snapshot.version
        shard.release(snapshot)

    def push(self, life, shard, j, gradient):
        push = push_of(
            life.worker, life.sequence, life.pulled[j], gradient, incarnation=life.incarnation
        )
        receipt = shard.push(push)
        self.applied[j] += receipt.outcome is Outcome.APPLIED
        self.clocks[j][life.worker] += 1

    def die(self, life):
        """At any time, with a push settled here and not there; noticed later, shard by shard."""
        after = _Life(life.worker, life.incarnation + 1, len(self.shards))
        after.on("fence")
        self.lives[life.worker] = after

    def end(self, life):
        del self.lives[life.worker]
        for clocks, shard in zip(self.clocks, self.shards, strict=True):
            clocks.pop(life.worker, None)
            shard.expect(set(self.lives))
            for w in self.lives:  # some are between two lives
                assert shard._pace.clock(w) == clocks.get(w)


@given(st.data())
@settings(deadline=None)
def test_there_is_always_a_worker_that_may_go_on_and_none_is_too_far_ahead(data):
    """Any number of shards, order of calls, deaths, ends, and gradients of NaNs."""
    num_workers, num_shards = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    cluster = _Cluster(num_workers, num_shards, data.draw(st.integers(0, 2)))
    rarely = st.integers(0, 11).map(lambda drawn: drawn == 11)
    spoilt = {}
    for _ in range(data.draw(st.integers(0, 150))):
        possible = cluster.possible()
        assert possible, "all wait"
        life, j = data.draw(st.sampled_from(possible))
        key = life.worker, life.incarnation, life.sequence
        if key not in spoilt:
            spoilt[key] = data.draw(rarely)
        cluster.call(life, j, NAN if spoilt[key] else None)
        if data.draw(rarely):
            cluster.die(life)
        elif len(cluster.lives) > 1 and life.state == "pull" and data.draw(rarely):
            cluster.end(life)
    for shard, applied in zip(cluster.shards, cluster.applied, strict=True):
        assert shard.version == applied
        assert (parameters_of(shard) == -applied).all()


def service_of(policy, num_workers):
    reference = shard_of(policy, num_workers)
    config = reference.config
    rate = ShardConfig(
        config.ranges, config.rule, Constant(lr=1.0), config.horizon, config.ema, policy
    )
    service = ShardService(rate)
    vectors = [torch.zeros(r.numel) for r in (config.ranges.parameters, config.ranges.statistics)]
    service.load(initial_state(config.rule, *vectors))
    return service


def push_ones(service, worker, sequence, version):
    with service.staging() as staging:
        staging.gradient.fill_(1.0)
        staging.statistics_delta.fill_(1.0)
        push = push_of(worker, sequence, version, staging.gradient, delta=staging.statistics_delta)
        return service.push(push)


def waiting(service, version, worker):
    """The answer to a pull that waits in a thread."""
    answer = Future()

    def wait():
        try:
            answer.set_result(service.reached(version, FOREVER_S, worker))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    return answer


@pytest.mark.parametrize("how", ["push", "fence", "expect"])
def test_a_pull_that_waits_goes_on_when_the_slowest_has_pushed_died_or_ended(how):
    service = service_of(Bounded(slack=0), 2)
    push_ones(service, 0, 0, 0)
    assert not service.reached(0, 0.0, 0)
    assert service.reached(0, 0.0), "an evaluator doesn't wait"
    answer = waiting(service, 0, 0)
    match how:
        case "push":
            push_ones(service, 1, 0, 0)
        case "fence":
            service.fence(1, 1)
        case "expect":
            service.expect({0}, 1)
    assert answer.result(DEADLINE_S)


def test_threads_of_workers_keep_step():
    service, num_workers, steps = service_of(Bounded(slack=0), 3), 3, 40
    seen = [[] for _ in range(num_workers)]

    def work(worker):
        for sequence in range(steps):
            assert service.reached(0, DEADLINE_S, worker)
            with service.pinned(worker) as snapshot:
                seen[worker].append(snapshot.version)
                assert (snapshot.parameters == -snapshot.version).all()
            push_ones(service, worker, sequence, snapshot.version)

    threads = [threading.Thread(target=work, args=(w,), daemon=True) for w in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert seen == [[num_workers * step for step in range(steps)]] * num_workers


def test_who_enters_a_service_late_is_waited_for():
    service = service_of(Bounded(slack=0), 2)
    service.fence(1, 1)
    for sequence in range(3):
        push_ones(service, 0, sequence, sequence)
    assert service.enter(1, 1) == 3
    assert service.enter(1, 1, 3) == 3
    push_ones(service, 0, 3, 3)
    assert not service.reached(0, 0.0, 0)


def test_other_modes_make_no_worker_wait():
    service = service_of(Async(), 2)
    for sequence in range(5):
        push_ones(service, 0, sequence, sequence)
    assert service.reached(0, 0.0, 0)
    assert service.enter(1, 1) == 0
