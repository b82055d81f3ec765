"""Modes that must come to the same do: to 1e-9 in float64, over 50 updates."""

import math

import pytest
import torch
from policy_shards import NUM_PARAMETERS, NUM_STATISTICS, Task, parameters_of, push_of, shard_of

from ps.consistency import Async, Averaging, Bounded, Sync
from ps.rules import SGD, Adam, Momentum, RMSprop
from ps.schedule import Constant, Exponential

STEPS, EXACT = 50, 1e-9
LR = Constant(lr=0.3)
RULES = [SGD(weight_decay=0.01), Momentum(weight_decay=0.01), RMSprop(), Adam()]


def assert_equal(one, other, tolerance=EXACT):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def pulled(shard, worker):
    """What a worker pulls: its version, and a copy of the parameters."""
    assert shard.may_pull(worker)
    snapshot = shard.pin(worker)
    copy = snapshot.parameters.clone()
    shard.release(snapshot)
    return snapshot.version, copy


def ran(shard, num_workers, seed, size=4, local_lr=None):
    """Rounds in which every worker pulls, in any order, and then pushes, in any order."""
    task, orders = Task(seed), torch.Generator().manual_seed(seed)
    batches = [[task.batch(size) for _ in range(num_workers)] for _ in range(STEPS)]
    for step in range(STEPS):
        at = {w: pulled(shard, w) for w in torch.randperm(num_workers, generator=orders).tolist()}
        for w in torch.randperm(num_workers, generator=orders).tolist():
            version, theta = at[w]
            gradient = task.gradient(theta, batches[step][w])
            if local_lr is not None:
                gradient = theta - (theta - local_lr * gradient)
            shard.push(push_of(w, step, version, gradient, size))
    return parameters_of(shard)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("num_workers", [2, 3, 5])
def test_sync_with_k_workers_is_one_process_with_a_batch_k_times_as_large(rule, num_workers):
    many, one = shard_of(Sync(), num_workers, rule, LR), shard_of(Sync(), 1, rule, LR)
    task = Task(num_workers)
    for step in range(STEPS):
        theta = parameters_of(one)
        sizes = [1 + (step + worker) % 4 for worker in range(num_workers)]
        batches = [task.batch(size) for size in sizes]
        for w, batch in enumerate(batches):
            gradient = task.gradient(parameters_of(many), batch)
            many.push(push_of(w, step, step, gradient, sizes[w]))
        one.push(push_of(0, step, step, task.gradient(theta, torch.cat(batches)), sum(sizes)))
    assert many.version == one.version == STEPS
    assert_equal(parameters_of(many), parameters_of(one))
    assert_equal(many.capture(["ema"]).vectors["ema"], one.capture(["ema"]).vectors["ema"])


def test_averaging_after_each_step_of_sgd_is_sync():
    policy = Averaging(local_steps=1)
    averaged = ran(shard_of(policy, 3, policy.server_rule(SGD())), 3, 1, local_lr=0.3)
    assert_equal(averaged, ran(shard_of(Sync(), 3, SGD(), LR), 3, 1))


def test_bounded_without_slack_is_sync_with_the_learning_rate_divided_by_the_workers():
    bounded = shard_of(Bounded(slack=0), 3, SGD(), Constant(lr=0.3 / 3))
    assert_equal(ran(bounded, 3, 2), ran(shard_of(Sync(), 3, SGD(), LR), 3, 2))
    assert bounded.version == 3 * STEPS


def test_without_slack_all_compute_from_what_earlier_clocks_made_however_late_they_pull():
    """One after the other: the second pulls when the first one's push is applied already."""
    task = Task(5)
    bounded = shard_of(Bounded(slack=0), 2, SGD(), Constant(lr=0.15))
    sync = shard_of(Sync(), 2, SGD(), LR)
    for step in range(STEPS):
        batches = [task.batch(4), task.batch(4)]
        for w in (0, 1) if step % 2 else (1, 0):
            version, theta = pulled(bounded, w)
            assert version == 2 * step
            bounded.push(push_of(w, step, version, task.gradient(theta, batches[w])))
        theta = parameters_of(sync)
        for w in (0, 1):
            sync.push(push_of(w, step, step, task.gradient(theta, batches[w])))
    assert_equal(parameters_of(bounded), parameters_of(sync))
    assert bounded.num_buffers <= 3


@pytest.mark.parametrize(
    "policy", [Async(), Async(staleness_lr=True, delay_compensation=0.5), Bounded()], ids=str
)
def test_async_with_one_worker_is_plain_sgd(policy):
    shard = shard_of(policy, 1, SGD(), LR)
    found = ran(shard, 1, 3)
    task, theta = Task(3), torch.linspace(-1, 1, NUM_PARAMETERS, dtype=torch.float64)
    for batch in [task.batch(4) for _ in range(STEPS)]:
        theta = theta - 0.3 * task.gradient(theta, batch)
    assert_equal(found, theta)


def test_the_learning_rate_is_divided_by_the_staleness():
    shard = shard_of(Async(staleness_lr=True), 4, start=0.0)
    receipts = [shard.push(push_of(w, 0, 0)) for w in range(4)]
    assert [receipt.staleness for receipt in receipts] == [0, 1, 2, 3]
    assert {receipt.lr for receipt in receipts} == {1.0}, "the schedule's"
    assert_equal(parameters_of(shard)[0].item(), -(1 + 1 + 1 / 2 + 1 / 3))


def dc_asgd(num_workers, weight, lr, seed):
    """Algorithm 2 of arXiv 1609.08326 with workers in turn, on tensors of its own."""
    task = Task(seed)
    theta = torch.linspace(-1, 1, NUM_PARAMETERS, dtype=torch.float64)
    backups = [theta] * num_workers
    for step in range(STEPS):
        worker = step % num_workers
        gradient = task.gradient(backups[worker], task.batch(4))
        theta = theta - lr * (gradient + weight * gradient**2 * (theta - backups[worker]))
        backups[worker] = theta
    return theta


@pytest.mark.parametrize("policy", [Async, Bounded])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_delays_are_compensated_as_dc_asgd_does(policy, num_workers):
    shard = shard_of(policy(delay_compensation=2.0), num_workers, SGD(), LR)
    task, at = Task(7), [pulled(shard, worker) for worker in range(num_workers)]
    for step in range(STEPS):
        w = step % num_workers
        gradient = task.gradient(at[w][1], task.batch(4))
        shard.push(push_of(w, step, at[w][0], gradient))
        at[w] = pulled(shard, w)
    assert shard.num_uncompensated == 0
    assert_equal(parameters_of(shard), dc_asgd(num_workers, 2.0, 0.3, 7))
    if num_workers > 1:
        assert (parameters_of(shard) - dc_asgd(num_workers, 0.0, 0.3, 7)).abs().max() > 1e-3


@pytest.mark.parametrize("num_workers", [1, 3])
def test_delayed_momentum_follows_the_papers_algorithm(num_workers):
    policy = Averaging(local_steps=2, asynchronous=True, outer_momentum=0.9, outer_lr=0.7)
    shard = shard_of(policy, num_workers, policy.server_rule(SGD(), num_workers))
    theta = parameters_of(shard)
    momentum = gathered = torch.zeros_like(theta)
    task = Task(9)
    for t in range(STEPS):
        g = task.gradient(theta, task.batch(4))
        shard.push(push_of(t % num_workers, t, shard.version, g))
        gathered = gathered + g
        if (t + 1) % num_workers == 0:
            momentum = 0.9 * momentum + gathered / num_workers
            theta = theta - 0.7 * (0.9 * momentum + g / num_workers)
            gathered = torch.zeros_like(theta)
        else:
            theta = theta - 0.7 * g / num_workers
        assert_equal(parameters_of(shard), theta)


def test_with_one_worker_delayed_momentum_is_nesterovs():
    policies = [
        Averaging(local_steps=1, asynchronous=asynchronous, outer_momentum=0.8)
        for asynchronous in (True, False)
    ]
    found = [ran(shard_of(p, 1, p.server_rule(SGD(), 1)), 1, 4, local_lr=0.1) for p in policies]
    assert_equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_in_rank_order_have_the_same_bits_whatever_the_order_of_arrival(dtype):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 5, NUM_PARAMETERS, generator=generator).to(dtype)
    deltas = torch.randn(6, 5, NUM_STATISTICS, generator=generator)

    def ends(policy, seed):
        shard = shard_of(policy, 5, Momentum(), LR, dtype=torch.float32)
        orders = torch.Generator().manual_seed(seed)
        for step in range(6):
            for w in torch.randperm(5, generator=orders).tolist():
                g, delta = gradients[step, w], deltas[step, w]
                shard.push(push_of(w, step, step, g, 3 + w, delta=delta))
        assert shard.version == 6
        return shard.capture().vectors

    first, *others = (ends(Sync(deterministic=True), seed) for seed in range(12))
    for other in others:
        assert all(torch.equal(vector, other[name]) for name, vector in first.items())
    by_arrival = [ends(Sync(), seed)["parameters"] for seed in range(12)]
    if dtype == torch.float32:  # sums of a few bf16 numbers are exact
        assert len({tuple(found.tolist()) for found in by_arrival}) > 1, "else this shows nothing"
    torch.testing.assert_close(first["parameters"], by_arrival[0], rtol=1e-5, atol=1e-6)


def test_who_has_gone_is_passed_over_in_rank_order():
    shard = shard_of(Sync(deterministic=True), 3, start=0.0)
    assert shard.push(push_of(2, 0, 0)).outcome.value == "accumulated"
    shard.expect({1, 2})
    assert shard.push(push_of(1, 0, 0)).outcome.value == "applied"
    assert_equal(parameters_of(shard)[0].item(), -1.0)
    for worker in (2, 1):
        shard.push(push_of(worker, 1, 1))
    assert_equal(parameters_of(shard)[0].item(), -2.0)


def test_decay_by_samples_takes_n_times_fewer_updates_in_sync():
    """Chen et al. divide the steps between two decays by N: the clock of samples does that."""

    def updates_until_halved(num_workers, schedule):
        shard, step = shard_of(Sync(), num_workers, SGD(), schedule), 0
        while True:
            receipts = [shard.push(push_of(w, step, step)) for w in range(num_workers)]
            if receipts[-1].lr < 1.0:
                return step
            step += 1

    for unit, every in (("samples", 48), ("epochs", 0.48)):
        schedule = Exponential(lr=1.0, decay=0.5, every=every, unit=unit)
        assert [updates_until_halved(n, schedule) for n in (1, 2, 4)] == [12, 6, 3]
    by_updates = Exponential(lr=1.0, decay=0.5, every=12, unit="updates")
    assert [updates_until_halved(n, by_updates) for n in (1, 2, 4)] == [12, 12, 12]


@pytest.mark.parametrize("policy", [Async(), Async(delay_compensation=1.0), Bounded(), Sync()])
@pytest.mark.parametrize("flaw", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_not_finite_leaves_everything_as_it_was(policy, flaw, dtype):
    shard = shard_of(policy, 2, Momentum())
    before = shard.capture()
    gradient = torch.ones(NUM_PARAMETERS, dtype=dtype)
    gradient[5] = flaw
    bad_delta = torch.full((NUM_STATISTICS,), flaw, dtype=torch.float64)
    good = torch.ones(NUM_PARAMETERS, dtype=torch.float64)
    for sequence, push in enumerate(
        (push_of(0, 0, 0, gradient), push_of(0, 1, 0, good, delta=bad_delta))
    ):
        assert shard.push(push).outcome.value == "not_finite", sequence
    after = shard.capture()
    assert after.clocks == before.clocks
    assert all(torch.equal(v, after.vectors[name]) for name, v in before.vectors.items())
