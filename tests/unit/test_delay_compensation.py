"""Delay compensation: exact in both paths of the update, and memory that stays bounded."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_shards import (
    NUM_PARAMETERS,
    NUM_STATISTICS,
    Task,
    parameters_of,
    push_of,
    shard_of,
)

from ps import kernels
from ps.consistency import Async
from ps.layout import Range
from ps.rules import (
    SGD,
    AdamW,
    Compensation,
    Momentum,
    RMSprop,
    apply_rule,
    plan_blocks,
    warm_up,
)
from ps.schedule import Constant
from ps.shard import Outcome, Shard
from ps.snapshot import Snapshot, Snapshots, max_buffers

RULES = [SGD(weight_decay=0.1), Momentum(weight_decay=0.1), RMSprop(), AdamW(weight_decay=0.1)]
WEIGHT, NUMEL = 1.5, 999


def updated(rule, vectors, compensation, num_threads=1, fused=True):
    """theta, EMA and slots after one update."""
    theta, gradient = vectors[0], vectors[1]
    out, ema = torch.empty_like(theta), theta.clone()
    slots = [torch.full_like(theta, first) for first in rule.slots.values()]
    blocks = plan_blocks(NUMEL, [Range(100, 300)])
    context = nullcontext() if fused else patch.object(kernels, "available", return_value=False)
    with patch("ps.rules.BLOCK_NUMEL", 128), context:
        apply_rule(
            rule, blocks, theta, out, gradient, slots, ema, 0.1, 0.9, 3, num_threads, compensation
        )
    return [out, ema, *slots]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_it_is_the_update_with_the_corrected_gradient(rule, dtype, fused):
    generator = torch.Generator().manual_seed(1)
    theta, gradient, pulled = (torch.randn(NUMEL, generator=generator) for _ in range(3))
    gradient = gradient.to(dtype)
    exact = [vector.double() for vector in (theta, gradient, pulled)]
    corrected = exact[1] + WEIGHT * exact[1] ** 2 * (exact[0] - exact[2])
    expected = updated(rule, (exact[0], corrected), None, fused=False)
    compensation = Compensation(pulled, WEIGHT)
    found = updated(rule, (theta, gradient), compensation, fused=fused)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    if fused:
        threads = updated(rule, (theta, gradient), compensation, num_threads=3)
        assert all(torch.equal(one, other) for one, other in zip(found, threads, strict=True))


def test_its_kernels_can_be_warmed_up_and_compute_in_float32():
    kernels.compiled.cache_clear()
    warm_up(SGD(), [torch.float32], compensates=True)
    compiled = kernels.compiled.cache_info().misses
    vectors = torch.ones(NUMEL), torch.ones(NUMEL)
    for compensation in (None, Compensation(torch.zeros(NUMEL), WEIGHT)):
        updated(SGD(), vectors, compensation)
    assert kernels.compiled.cache_info().misses == compiled == 2


def pulled(shard, worker):
    snapshot = shard.pin(worker)
    copy = snapshot.parameters.clone()
    shard.release(snapshot)
    return snapshot.version, copy


def compensating(num_workers=2, dtype=torch.float64):
    policy = Async(delay_compensation=WEIGHT)
    return shard_of(policy, num_workers, SGD(), Constant(lr=0.2), dtype=dtype)


@given(st.data())
@settings(deadline=None)
def test_each_push_is_corrected_from_what_it_was_computed_from(data):
    """Workers pull up to one ahead, die, end, and send NaNs, in any order."""
    num_workers = data.draw(st.integers(1, 3))
    shard, task = compensating(num_workers), Task(data.draw(st.integers(0, 5)))
    theta = parameters_of(shard)
    under_way = {w: [] for w in range(num_workers)}
    lives = dict.fromkeys(under_way, 0)
    for sequence in range(data.draw(st.integers(0, 40))):
        w = data.draw(st.sampled_from(sorted(under_way)))
        action = data.draw(st.sampled_from(["pull", "pull", "push", "push", "push", "nan", "die"]))
        if action == "pull" and len(under_way[w]) < 2:
            under_way[w].append(pulled(shard, w))
        elif action == "die":
            lives[w] += 1
            under_way[w] = []
            shard.fence(w, lives[w])
        elif action in ("push", "nan") and under_way[w]:
            version, at = under_way[w].pop(0)
            g = task.gradient(at, task.batch(4))
            if action == "push":
                theta = theta - 0.2 * (g + WEIGHT * g**2 * (theta - at))
            sent = g if action == "push" else g * torch.nan
            shard.push(push_of(w, sequence, version, sent, incarnation=lives[w]))
    torch.testing.assert_close(parameters_of(shard), theta, rtol=0, atol=1e-9)
    assert shard.num_uncompensated == 0
    kept = shard.config.policy.kept_versions(num_workers)
    assert shard.num_buffers <= max_buffers(1, kept)
    shard.expect(())
    assert not shard._backups._kept
    assert not shard._snapshots._pinned, "nothing is kept for those who are gone"


def test_what_is_kept_no_longer_is_applied_as_it_is_and_counted():
    shard = compensating()
    first = pulled(shard, 0)
    for _ in range(2):  # three pulls and no push: the first one is displaced
        shard.push(push_of(1, shard.version, shard.version))
        pulled(shard, 0)
    before = parameters_of(shard)
    assert shard.push(push_of(0, 0, first[0])).outcome is Outcome.APPLIED
    torch.testing.assert_close(parameters_of(shard), before - 0.2, rtol=0, atol=1e-12)
    assert shard.num_uncompensated == 1
    resumed = Shard(shard.config, shard.capture())
    resumed.push(push_of(0, 1, 1))
    assert resumed.num_uncompensated == 1, "nor after a restart"
    resumed.push(push_of(0, 2, resumed.version))
    assert resumed.num_uncompensated == 1, "what is fresh needs no correction"


def test_a_retried_pull_and_a_retried_push_change_nothing():
    shard = compensating()
    version, _ = pulled(shard, 0)
    assert pulled(shard, 0)[0] == version
    shard.push(push_of(1, 0, 0))
    first = shard.push(push_of(0, 0, version))
    assert shard.push(push_of(0, 0, version)) == first
    assert shard.push(push_of(0, 1, version)).staleness == 2
    assert shard.num_uncompensated == 0, "pulled twice, so good for two pushes"


def test_a_push_gives_back_what_was_pulled_before_and_not_used():
    shard = compensating()
    pulled(shard, 0)
    shard.push(push_of(1, 0, 0))
    version, _ = pulled(shard, 0)
    shard.push(push_of(1, 1, 1))
    shard.push(push_of(0, 0, version))
    assert shard.num_uncompensated == 0
    assert not shard._snapshots._pinned
    assert not shard._backups._kept


def test_a_square_that_overflows_is_not_finite():
    shard = compensating(dtype=torch.float32)
    version, _ = pulled(shard, 0)
    delta = torch.zeros(NUM_STATISTICS)
    huge = torch.full((NUM_PARAMETERS,), 1e25)
    assert shard.push(push_of(0, 0, version, huge, delta=delta)).outcome is Outcome.NOT_FINITE
    plain = shard_of(Async(), 2, dtype=torch.float32)
    assert plain.push(push_of(0, 0, 0, huge, delta=delta)).outcome is Outcome.APPLIED


def test_a_marked_version_stays_until_another_is_marked():
    snapshots = Snapshots(Snapshot(0, torch.zeros(4), torch.zeros(0)))
    snapshots.mark()
    for version in range(1, 6):
        snapshots.publish(snapshots.next_buffer(), version)
    marked = snapshots.pin_marked()
    assert (marked.version, snapshots.num_buffers) == (0, max_buffers(0, 1))
    snapshots.mark()
    assert snapshots.pin_marked().version == 5
    snapshots.release(marked)
    assert snapshots.next_buffer() in (marked, snapshots.next_buffer())
    with pytest.raises(AssertionError, match="written to already"):
        snapshots.pin_again(marked)
