"""Synchronous SGD at a shard: the first N gradients of a version make the next (Algorithm 4)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asynception.plan import plan_model
from asynception.recipe import validate
from model.errors import InputError
from ps.consistency import Sync
from ps.layout import Range, ShardRanges
from ps.push import Push
from ps.rules import SGD, Ema, Momentum, RMSprop
from ps.schedule import Clocks, Constant, Exponential, Horizon
from ps.shard import Outcome, Shard, ShardConfig, initial_state
from worker.rounds import Rounds

NUM_PARAMETERS, NUM_STATISTICS = 48, 16
RANGES = ShardRanges(Range(0, NUM_PARAMETERS), Range(0, NUM_STATISTICS), (Range(4, 20),))
RULES = [SGD(weight_decay=0.01), Momentum(weight_decay=0.01), RMSprop(weight_decay=0.01)]
HALVING = Exponential(lr=0.1, decay=0.5, every=10, unit="updates")
AVERAGE = Ema(decay=0.9)


def shard_of(num_workers, backup_workers=0, rule=SGD(), schedule=Constant(lr=1.0)):  # noqa: B008
    config = ShardConfig(
        RANGES,
        rule,
        schedule,
        Horizon(epoch_samples=100, num_workers=num_workers),
        AVERAGE,
        Sync(backup_workers=backup_workers),
    )
    start = torch.linspace(-1, 1, NUM_PARAMETERS)
    return Shard(config, initial_state(rule, start, torch.zeros(NUM_STATISTICS)))


def push_of(worker, sequence=0, version=0, incarnation=0, num_samples=4, gradient=None):
    if gradient is None:
        gradient = torch.ones(NUM_PARAMETERS)
    return Push(
        worker, incarnation, sequence, version, num_samples, gradient, torch.ones(NUM_STATISTICS)
    )


def assert_equal_states(one, other, atol=0.0):
    assert one.clocks == other.clocks
    for name, vector in one.vectors.items():
        torch.testing.assert_close(vector, other.vectors[name], rtol=0.0, atol=atol)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("num_workers", [2, 3, 5])
def test_k_workers_are_one_process_with_a_batch_k_times_as_large(rule, num_workers):
    generator = torch.Generator().manual_seed(num_workers)
    many = shard_of(num_workers, rule=rule, schedule=HALVING)
    one = shard_of(1, rule=rule, schedule=HALVING)
    for step in range(50):
        sizes = torch.randint(1, 9, (num_workers,), generator=generator).tolist()
        gradients = torch.randn(num_workers, NUM_PARAMETERS, generator=generator)
        whole = sum(n * g for n, g in zip(sizes, gradients.double(), strict=True)) / sum(sizes)
        one.push(push_of(0, step, step, num_samples=sum(sizes), gradient=whole.float()))
        order = torch.randperm(num_workers, generator=generator).tolist()
        outcomes = [
            many.push(
                push_of(w, step, step, num_samples=sizes[w], gradient=gradients[w].clone())
            ).outcome
            for w in order
        ]
        assert outcomes == [Outcome.ACCUMULATED] * (num_workers - 1) + [Outcome.APPLIED]
    assert many.clocks.updates == 50
    assert_equal_states(many.capture(), one.capture(), atol=1e-5)


def test_the_late_ones_are_dropped_and_counted():
    shard = shard_of(num_workers=4, backup_workers=1)
    outcomes = [shard.push(push_of(worker)).outcome for worker in range(4)]
    assert outcomes == [Outcome.ACCUMULATED, Outcome.ACCUMULATED, Outcome.APPLIED, Outcome.STALE]
    assert shard.clocks == Clocks(updates=1, samples=12)
    assert shard.settled[Outcome.STALE] == 1


@given(st.data())
@settings(deadline=None)
def test_updates_are_conserved_whatever_arrives_again_or_late(data):
    """With gradients of ones and SGD at lr 1, parameters say how many versions were made."""
    num_workers = data.draw(st.integers(1, 5))
    backup = data.draw(st.integers(0, num_workers - 1))
    shard = shard_of(num_workers, backup)
    start = shard.capture().vectors["parameters"]
    sequences, pulled, lives, sent = {}, {}, {}, []
    applied = 0
    for _ in range(data.draw(st.integers(0, 40))):
        worker = data.draw(st.integers(0, num_workers - 1))
        match data.draw(st.sampled_from(["push", "push", "push", "pull", "again", "die"])):
            case "pull":
                pulled[worker] = shard.version
            case "die":
                lives[worker] = lives.get(worker, 0) + 1
                sequences[worker] = 0
                shard.fence(worker, lives[worker])
            case "push":
                sequence = sequences.get(worker, 0)
                sequences[worker] = sequence + 1
                life = lives.get(worker, 0)
                push = (worker, sequence, pulled.get(worker, 0), life)
                receipt = shard.push(push_of(*push))
                sent.append((push, receipt))
                applied += receipt.outcome is Outcome.APPLIED
            case "again" if sent:
                push, receipt = sent[-1]
                answer = shard.push(push_of(*push))
                dead = push[3] < lives.get(push[0], 0)
                assert answer.outcome is Outcome.FENCED if dead else answer == receipt
    assert shard.version == applied
    moved = start - shard.capture().vectors["parameters"]
    torch.testing.assert_close(moved, torch.full_like(moved, applied), rtol=0, atol=1e-4)
    assert (shard.pin().statistics - applied).abs().max() < 1e-4


def test_a_worker_counts_once_in_a_version_whatever_its_life():
    shard = shard_of(num_workers=2)
    assert shard.push(push_of(0)).outcome is Outcome.ACCUMULATED
    shard.fence(0, 1)
    assert shard.push(push_of(0, incarnation=1)).outcome is Outcome.STALE
    assert shard.push(push_of(1)).outcome is Outcome.APPLIED
    assert shard.push(push_of(0, 1, 1, incarnation=1)).outcome is Outcome.ACCUMULATED


def test_who_has_gone_is_not_waited_for_and_who_works_on_is():
    shard = shard_of(num_workers=3)
    shard.push(push_of(0))
    shard.expect({0, 1})
    assert shard.version == 0, "the gradient of 1 may be on its way"
    assert shard.push(push_of(1)).outcome is Outcome.APPLIED
    assert shard.clocks == Clocks(updates=1, samples=8)
    assert shard.push(push_of(0, 1, 1)).outcome is Outcome.ACCUMULATED
    shard.expect({0})
    assert shard.version == 2, "all that could come are there"
    assert shard.push(push_of(0, 2, 2)).outcome is Outcome.APPLIED
    shard.expect(())
    assert shard.version == 3, "there was nothing left to apply"
    assert shard.settled == {Outcome.APPLIED: 3, Outcome.ACCUMULATED: 1}


def test_what_a_worker_leaves_in_the_sum_is_applied_with_the_others():
    shard = shard_of(num_workers=2)
    shard.push(push_of(0))
    shard.expect({1})
    assert shard.push(push_of(1)).outcome is Outcome.APPLIED
    assert shard.clocks == Clocks(updates=1, samples=8)
    assert shard.settled[Outcome.STALE] == 0


def test_a_capture_does_not_count_what_is_only_accumulated():
    """A run that goes on from it does that work again, and loses none."""
    shard = shard_of(num_workers=2)
    for step in range(2):
        for worker in range(2):
            shard.push(push_of(worker, step, step))
    shard.push(push_of(1, sequence=2, version=2))
    state = shard.capture()
    assert state.clocks.updates == 2
    assert state.last_sequences == {0: {0: 1}, 1: {0: 1}}
    resumed = Shard(shard.config, state)
    for each in (shard, resumed):
        each.push(push_of(1, sequence=2, version=2))
        each.push(push_of(0, sequence=2, version=2))
    assert_equal_states(shard.capture(), resumed.capture())


def test_a_gradient_of_nans_is_not_waited_past():
    shard, rounds = shard_of(num_workers=2), Rounds(1)
    assert rounds.begin([0]) == [0]
    bad = push_of(0, gradient=torch.full((NUM_PARAMETERS,), float("nan")))
    receipt = shard.push(bad)
    assert receipt.outcome is Outcome.NOT_FINITE
    rounds.end([receipt])
    assert rounds.at_least == [0], "its worker makes another for this version"
    assert shard.push(push_of(1)).outcome is Outcome.ACCUMULATED
    last = shard.push(push_of(0, sequence=1))
    assert last.outcome is Outcome.APPLIED
    rounds.end([last])
    assert rounds.at_least == [1]


def test_settings_that_would_wait_for_nobody_are_refused():
    tree = {
        "data": {"train": "/a", "val": "/b"},
        "training": {"epochs": 1},
        "scaling": {"num_workers": 3},
    }
    policy = validate(tree | {"consistency": {"mode": "sync", "backup_workers": 2}}).consistency
    assert policy.pushes_per_update(3) == 1
    with pytest.raises(InputError, match=r"backup_workers = 3 leaves none of scaling.num_workers"):
        validate(tree | {"consistency": {"mode": "sync", "backup_workers": 3}})


def test_a_server_reserves_memory_for_its_sums():
    tree = {
        "data": {"train": "/a", "val": "/b", "image_size": 32},
        "training": {"epochs": 1},
        "model": {"width": 0.05},
    }
    apart, together = (
        plan_model(validate(tree | {"consistency": {"mode": mode}}), num_classes=3)
        for mode in ("async", "sync")
    )
    sums = 4 * apart.layout.shards[0].numel
    assert together.server_num_bytes(0) == apart.server_num_bytes(0) + sums
