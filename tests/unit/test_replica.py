"""A primary and its standby: equal to the last bit, and nothing answered that the standby lacks."""

import random
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from log_operations import POLICIES, config_of, facts, first_state_of, operations
from near_replicas import NearLink, a_push, image_of, pair_of, service_of, tell
from waiting import DEADLINE_S, background, eventually

from ps.operations import Fence
from ps.push import Order
from ps.receipts import Outcome
from ps.replica import MAX_BACKLOG, LinkDown
from ps.replicated import ReplicatedService, Retired, StandbyLost
from ps.service import LateLoad, NotLoaded, ShardService
from ps.standby import NotInStep, OutOfTurn, Superseded


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@given(
    before=st.lists(operations, max_size=8),
    during=st.lists(operations, max_size=12),
    after=st.lists(operations, max_size=8),
    seed=st.integers(0, 99),
)
def test_a_promoted_standby_answers_all_as_its_primary_would(policy, before, during, after, seed):
    alone, primary = service_of(policy), service_of(policy)
    standby = service_of(policy, loaded=False)
    for operation in before:
        assert tell(primary, operation) == tell(alone, operation)
    primary.attach(1, lambda: NearLink(standby, random.Random(seed)))
    for operation in during:
        assert tell(primary, operation) == tell(alone, operation)
        assert image_of(standby) == image_of(primary) == image_of(alone)
    assert standby.promote(2) == alone.status().clocks.updates
    for operation in (*during, *after):  # also what had been answered, once more
        assert tell(standby, operation) == tell(alone, operation)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@given(given_operations=st.lists(operations, max_size=20))
def test_alone_it_answers_as_a_service_without_replication(policy, given_operations):
    alone, fixed = service_of(policy), ShardService(config_of(policy), allocate=torch.empty)
    fixed.load(first_state_of(fixed.config))
    for operation in given_operations:
        assert tell(alone, operation) == tell(fixed, operation)
        assert image_of(alone) == facts(fixed._shard.image())


def test_what_waited_when_the_standby_was_given_up_is_not_overtaken():
    primary, _, _ = pair_of(POLICIES[0])
    go_on, perform = threading.Event(), primary._perform_in_turn

    def dawdle(*arguments):
        go_on.wait(DEADLINE_S)
        return perform(*arguments)

    primary._perform_in_turn = dawdle
    first = background(lambda: primary.push(a_push(worker=0)))
    eventually(lambda: primary._num_logged == 1 and not primary._is_taken)
    primary.detach(2)
    second = background(lambda: primary.push(a_push(worker=1)))
    eventually(lambda: primary._num_logged == 2 or second.done())
    assert not second.done()
    go_on.set()
    assert [each.result(DEADLINE_S).version for each in (first, second)] == [0, 1]
    assert primary.push(a_push(worker=2)).version == 2


def test_one_without_a_standby_says_so_if_it_is_to_have_one():
    config = config_of(POLICIES[0])
    primary, standby = (
        ReplicatedService(config, allocate=torch.empty, is_paired=False) for _ in range(2)
    )
    primary.load(first_state_of(config))
    assert primary.status().replica is None
    assert service_of(POLICIES[0]).status().replica.state == "none"
    primary.attach(1, lambda: NearLink(standby))
    assert primary.status().replica.state == "in_step"
    standby.promote(2)
    assert standby.status().replica is None


def test_an_answered_push_is_at_the_standby_and_comes_again_in_vain():
    primary, standby, _ = pair_of(POLICIES[0])
    first = primary.push(a_push())
    standby.promote(2)
    assert standby.push(a_push()) == first
    assert standby.status().clocks.updates == 1


def test_no_push_is_answered_or_shown_before_the_standby_has_it():
    primary, standby, link = pair_of(POLICIES[0])
    link.is_cut = True
    pushing = background(lambda: primary.push(a_push()))
    eventually(lambda: link.num_calls > 3)
    assert not pushing.done()
    assert primary.status().clocks.updates == 0
    assert primary.status().replica.num_behind == 1
    link.is_cut = False
    assert pushing.result(DEADLINE_S).outcome is Outcome.APPLIED
    assert image_of(standby) == image_of(primary)


def test_what_pushes_wait_for_the_standby_is_counted_apart_from_the_queue():
    now_s = [0.0]
    primary = service_of(POLICIES[0], clock=lambda: now_s[0])
    primary.push(a_push())
    assert primary.status().replica.waited_s == 0
    link = NearLink(service_of(POLICIES[0], loaded=False))
    primary.attach(1, lambda: link)
    link.is_cut, answered = True, link.num_calls
    first = background(lambda: primary.push(a_push(sequence=1)))
    eventually(lambda: link.num_calls > answered)
    second = background(lambda: primary.push(a_push(worker=1)))
    eventually(lambda: primary._turns._waiters)
    now_s[0] = 7.0
    assert primary.status().replica.waiting_s == 7.0
    link.is_cut = False
    assert first.result(DEADLINE_S).version == 1
    assert second.result(DEADLINE_S).version == 2
    status = primary.status()
    assert (status.replica.waited_s, status.queue_s, status.apply_s) == (14.0, 0.0, 0.0)
    assert status.replica.waiting_s == 0
    primary.fence(0, 0)
    assert primary.status().replica.waited_s == 14.0
    primary.detach(2)
    assert primary.status().replica.waited_s == 14.0, "added up over all standbys"


def test_a_primary_carries_out_in_the_order_of_the_log_whoever_is_quicker():
    primary, standby, _ = pair_of(POLICIES[0])
    go_on, perform = threading.Event(), primary._perform_in_turn

    def dawdle(index, *others):
        if index == 0:
            go_on.wait(DEADLINE_S)
        return perform(index, *others)

    primary._perform_in_turn = dawdle
    first = background(lambda: primary.push(a_push(worker=0, value=0.3)))
    eventually(lambda: standby._standby._next_index == 1)
    second = background(lambda: primary.push(a_push(worker=1, value=-0.7)))
    eventually(lambda: standby._standby._next_index == 2)
    assert not second.done()
    go_on.set()
    assert [each.result(DEADLINE_S).version for each in (first, second)] == [0, 1]
    assert image_of(standby) == image_of(primary)


def test_a_push_whose_primary_dies_before_its_answer_is_settled_once():
    primary, standby, link = pair_of(POLICIES[0])

    def die(call):
        call()
        raise Superseded("it died here")

    link._carry = die
    with pytest.raises(Retired):
        primary.push(a_push())
    standby.promote(2)
    assert standby.push(a_push()).version == 0
    assert standby.status().clocks.updates == 1


def test_a_stale_primary_can_neither_write_nor_answer():
    primary, standby, _ = pair_of(POLICIES[0])
    primary.push(a_push())
    standby.promote(2)
    with pytest.raises(Retired):
        primary.push(a_push(sequence=1))
    assert standby.status().clocks.updates == 1
    for call in (
        primary.status,
        lambda: primary.reached(0, 0.0),
        lambda: primary.pinned().__enter__(),
        lambda: primary.cut("name", 0, 0.0, None),
        lambda: primary.push(a_push()),
        lambda: primary.fence(0, 1),
    ):
        with pytest.raises(Retired):
            call()


def test_a_primary_that_is_told_so_retires_and_pulls_that_wait_end():
    primary, _, _ = pair_of(POLICIES[0])
    waiting = background(lambda: primary.reached(1, DEADLINE_S))
    eventually(lambda: primary._published._waiters)
    with pytest.raises(OutOfTurn):
        primary.retire(1)
    primary.retire(2)
    with pytest.raises(Retired):
        waiting.result(DEADLINE_S)


def test_a_primary_goes_on_without_its_standby_when_it_is_told_to():
    primary, standby, link = pair_of(POLICIES[0])
    link.is_cut = True
    pushing = background(lambda: primary.push(a_push()))
    eventually(lambda: link.num_calls > 3)
    primary.detach(1)  # not a new epoch
    assert not pushing.done()
    primary.detach(2)
    assert pushing.result(DEADLINE_S).outcome is Outcome.APPLIED
    assert primary.status().replica.state == "none"
    assert standby.status.__self__._standby.is_seeded


def test_a_new_standby_is_seeded_while_updates_go_on():
    primary, _, _ = pair_of(POLICIES[0])
    primary.push(a_push())
    primary.detach(2)
    standby = service_of(POLICIES[0], loaded=False)
    link = NearLink(standby)
    link.is_cut = True
    attaching = background(lambda: primary.attach(3, lambda: link))
    eventually(lambda: link.num_calls)
    reused = a_push()
    for sequence in range(1, 1 + MAX_BACKLOG):
        reused.gradient.fill_(float(sequence))
        primary.push(replace(reused, sequence=sequence))
    reused.gradient.fill_(0.0)
    with pytest.raises(NotLoaded):
        standby.status()
    assert primary.status().replica.state == "seeding"
    one_more = background(lambda: primary.push(a_push(sequence=1 + MAX_BACKLOG)))
    eventually(lambda: primary._num_logged > primary._num_performed)
    assert not one_more.done()
    assert primary.status().replica.num_behind == MAX_BACKLOG
    link.is_cut = False
    attaching.result(DEADLINE_S)
    one_more.result(DEADLINE_S)
    assert image_of(standby) == image_of(primary)
    assert primary.status().replica.state == "in_step"
    primary.attach(3, lambda: link)  # again, in vain


def test_a_standby_that_is_not_in_step_is_not_promoted():
    primary, standby = service_of(POLICIES[0]), service_of(POLICIES[0], loaded=False)
    with pytest.raises(NotInStep):
        standby.promote(2)
    link = NearLink(standby)
    link.complete = lambda order: (_ for _ in ()).throw(LinkDown)
    attaching = background(lambda: primary.attach(1, lambda: link))
    eventually(lambda: standby._standby.is_seeded)
    with pytest.raises(NotInStep):
        standby.promote(2)
    primary.detach(2)
    with pytest.raises(StandbyLost):
        attaching.result(DEADLINE_S)


@pytest.mark.parametrize("vector", ["_ema", "_slots"])
def test_a_standby_that_differs_is_an_error_that_names_the_version(vector):
    primary, standby, _ = pair_of(POLICIES[0])
    primary.push(a_push(sequence=0))
    held = getattr(standby._standby._shard, vector)
    (held if isinstance(held, torch.Tensor) else held[0])[5] += 1e-3
    primary.push(a_push(sequence=1))
    status = primary.status().replica
    assert status.state == "failed"
    assert "differs at version 2" in status.error
    assert primary.push(a_push(sequence=2)).outcome is Outcome.APPLIED  # until the run is ended


def test_a_standby_whose_receipt_differs_is_an_error_at_once():
    primary, standby, link = pair_of(POLICIES[0])
    follow = standby.follow

    def other(order, operation):
        echo = follow(order, operation)
        return replace(echo, receipt=replace(echo.receipt, lr=0.25))

    standby.follow = other
    primary.push(a_push())
    assert "differs at version 1" in primary.status().replica.error
    assert not link.is_open


def test_operations_out_of_turn_have_no_effect():
    primary, standby, _ = pair_of(POLICIES[0])
    primary.push(a_push())
    before = image_of(standby)
    order = replace(primary_order(primary), index=5)
    with pytest.raises(OutOfTurn):
        standby.follow(order, Fence(0, 1))
    with pytest.raises(Superseded):
        standby.follow(replace(order, epoch=0), Fence(0, 1))
    with pytest.raises(OutOfTurn):
        standby.follow(replace(order, epoch=7), Fence(0, 1))
    assert image_of(standby) == before


def primary_order(primary):
    return Order(primary._epoch, primary._num_logged)


def test_an_operation_that_comes_again_gets_the_first_answer():
    primary, standby, _ = pair_of(POLICIES[0])
    order = primary_order(primary)
    first = standby.follow(order, a_push())
    assert first.receipt.outcome is Outcome.APPLIED
    assert standby.follow(order, a_push()) == first
    standby.promote(2)
    for epoch in (1, 2, 3):
        with pytest.raises(Superseded):
            standby.follow(Order(epoch, order.index + 1), a_push(sequence=1))
    assert standby.status().clocks.updates == 1


def test_no_state_is_loaded_over_one_that_a_standby_has():
    primary, standby, _ = pair_of(POLICIES[0])
    for service in (primary, standby):
        with pytest.raises(LateLoad):
            service.load(first_state_of(service.config))


@contextmanager
def pushers(routes, num_workers, num_pushes):
    """Workers in threads, each of which repeats a push until it has a receipt."""

    def work(worker):
        dice = random.Random(worker)
        for sequence in range(num_pushes):
            while True:
                try:
                    routes[0].push(a_push(worker, sequence, dice.uniform(-1, 1)))
                    break
                except Retired:
                    pass

    working = [background(lambda worker=worker: work(worker)) for worker in range(num_workers)]
    yield
    for each in working:
        each.result(DEADLINE_S)


def test_nothing_is_lost_or_doubled_among_threads_when_primaries_die_one_after_the_other():
    num_pushes = 40
    dice = random.Random(3)
    primary, standby, _ = pair_of(POLICIES[0], dice)
    routes = [primary]
    with pushers(routes, 3, num_pushes):
        for epoch in range(2, 12, 2):
            version = routes[0].status().clocks.updates
            standby.promote(epoch)
            routes[0] = primary = standby
            standby = service_of(POLICIES[0], loaded=False)
            link = NearLink(standby, dice)
            primary.attach(epoch + 1, lambda link=link: link)
            assert primary.status().clocks.updates >= version
    assert primary.status().replica.error == ""
    assert primary.status().clocks.updates == 3 * num_pushes
    assert image_of(standby) == image_of(primary)
