"""The fused kernels against float64, against the torch path, and against themselves."""

import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from update_reference import reference

from ps import kernels, rules
from ps.layout import Range
from ps.rules import SGD, Adam, AdamW, Momentum, RMSprop, apply_rule, plan_blocks, warm_up

UNIT = 2.0**-24
"""The largest relative error of one rounding to float32."""
STEPS = 10
ALL_RULES = [
    SGD(weight_decay=0.01),
    Momentum(momentum=0.9, weight_decay=0.01),
    Momentum(momentum=0.5, nesterov=True, weight_decay=0.01),
    RMSprop(rho=0.9, momentum=0.9, epsilon=1.0, weight_decay=0.01),
    RMSprop(rho=0.0, momentum=0.0, epsilon=1e-3),
    Adam(weight_decay=0.01),
    AdamW(betas=(0.0, 0.4), epsilon=1e-3, weight_decay=0.1),
]
by_rule = pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.name)
by_gradient = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def on_path(fused):
    return patch.object(kernels, "available", lambda: fused)


@st.composite
def cases(draw):
    """(numel, decayed ranges, elements of a block): none, one, odd, several blocks."""
    numel = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65]) | st.integers(0, 400))
    borders = sorted(draw(st.lists(st.integers(0, numel), unique=True, max_size=8)))
    pairs = zip(borders[::2], borders[1::2], strict=False)
    block_numel = draw(st.sampled_from([1, 7, 16, 50, 64, 1 << 18]))
    return numel, tuple(Range(start, stop) for start, stop in pairs), block_numel


class Start:
    """Vectors that begin anywhere in larger ones, gradients, and what float64 makes of them."""

    def __init__(self, rule, case, dtype, seed, offset=0, ema_decay=0.9):
        self.rule, self.ema_decay, self.offset = rule, ema_decay, offset
        numel, self.decayed, self.block_numel = case
        random = np.random.default_rng(seed)
        self.theta = torch.tensor(random.normal(size=numel), dtype=torch.float32)
        size = random.choice([0.01, 1, 10], size=(STEPS, 1))
        gradients = torch.tensor(random.normal(size=(STEPS, numel)) * size)
        self.gradients = gradients.to(dtype)
        self.lrs = [0.1] * (STEPS // 2) + [0.01] * (STEPS - STEPS // 2)
        self.mask = np.zeros(numel, bool)
        for span in self.decayed:
            self.mask[span.start : span.stop] = True

    def _placed(self, vector):
        """A copy that begins `offset` elements after an allocation does."""
        whole = torch.full((self.offset + vector.numel() + 3,), 77, dtype=vector.dtype)
        part = whole[self.offset : self.offset + vector.numel()]
        part.copy_(vector)
        return part

    def run(self, num_threads):
        """theta, ema and slots after all updates."""
        with patch.object(rules, "BLOCK_NUMEL", self.block_numel):
            blocks = plan_blocks(self.theta.numel(), self.decayed)
        theta, ema = self._placed(self.theta), self._placed(self.theta)
        slots = [torch.full_like(self.theta, first) for first in self.rule.slots.values()]
        slots = [self._placed(slot) for slot in slots]
        for step, (gradient, lr) in enumerate(zip(self.gradients, self.lrs, strict=True)):
            g, out = self._placed(gradient), torch.full_like(theta, torch.nan)
            kept = theta.clone()
            decay = self.ema_decay
            apply_rule(self.rule, blocks, theta, out, g, slots, ema, lr, decay, step, num_threads)
            assert torch.equal(theta, kept)
            assert torch.equal(g, gradient)
            theta = out
        return [theta, ema, *slots]

    def expected(self):
        """The same in float64, after each update."""
        theta, gradients = self.theta.double().numpy(), self.gradients.double().numpy()
        return reference(self.rule, theta, self.mask, gradients, self.lrs, self.ema_decay)


def roundings(found, states):
    """The largest error of each vector in units of the rounding of its largest value so far."""
    worst = []
    for index, vector in enumerate(found):
        history = [state[index] for state in states]
        scale = max((np.abs(each).max(initial=0) for each in history), default=0)
        error = np.abs(vector.double().numpy() - history[-1]).max(initial=0)
        worst.append(error / (UNIT * max(scale, 1e-30)))
    return worst


@by_rule
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch"])
@given(
    case=cases(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_threads=st.integers(1, 3),
    offset=st.integers(0, 17),
    ema_decay=st.sampled_from([0.0, 0.4, 0.9, 0.9999]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=25)
def test_ten_updates_equal_float64_to_rounding(
    rule, fused, case, dtype, num_threads, offset, ema_decay, seed
):
    """Each update may add two roundings; 8 in all is the most that was ever seen."""
    start = Start(rule, case, dtype, seed, offset, ema_decay)
    with on_path(fused):
        found = start.run(num_threads)
    assert max(roundings(found, start.expected())) <= 2 * STEPS


@by_rule
@by_gradient
def test_threads_places_and_blocks_change_no_bit(rule, dtype):
    numel, decayed = 5003, (Range(3, 1999), Range(2000, 2001), Range(4000, 5003))
    alone = Start(rule, (numel, decayed, 10**9), dtype, seed=5).run(num_threads=1)
    for num_threads, block_numel, offset in [(1, 64, 1), (2, 64, 0), (2, 701, 3), (3, 333, 5)]:
        start = Start(rule, (numel, decayed, block_numel), dtype, seed=5, offset=offset)
        for vector, expected in zip(start.run(num_threads), alone, strict=True):
            assert torch.equal(vector, expected)


@by_gradient
def test_shards_of_one_process_may_update_at_once(dtype):
    rule, case = Momentum(weight_decay=0.01), (3001, (Range(10, 2000),), 64)
    starts = [Start(rule, case, dtype, seed) for seed in range(4)]
    alone = [start.run(num_threads=1) for start in starts]
    gate = threading.Barrier(len(starts))

    def together(start):
        gate.wait(60)
        return start.run(num_threads=2)

    with ThreadPoolExecutor(len(starts)) as pool:
        for found, expected in zip(pool.map(together, starts), alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def once(rule, theta, gradient, averages=True, lr=1.0, num_threads=1):
    """out and slots of one update, and its EMA, whose decay is 0."""
    ema = torch.full_like(theta, -5) if averages else None
    out = torch.full_like(theta, 77)
    slots = [torch.full_like(theta, first) for first in rule.slots.values()]
    blocks = plan_blocks(theta.numel(), (Range(0, theta.numel() // 2),))
    apply_rule(rule, blocks, theta, out, gradient, slots, ema, lr, 0.0, 0, num_threads)
    return [out, *slots, ema] if averages else [out, *slots]


def test_every_bf16_number_is_widened_exactly():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    gradient = bits.view(torch.bfloat16)
    out = once(SGD(), torch.zeros(2**16), gradient, lr=-1.0)[0]
    np.testing.assert_array_equal(out.numpy(), gradient.float().numpy())  # NaN equals NaN


@by_rule
@by_gradient
def test_nan_and_inf_spoil_their_own_element_only(rule, dtype):
    """Shards refuse such gradients; here they are as in the torch path."""
    generator = torch.Generator().manual_seed(2)
    theta, gradient = torch.randn(200, generator=generator), torch.randn(200, generator=generator)
    theta[77], theta[150] = torch.inf, torch.nan
    bad = {3: torch.nan, 40: torch.inf, 111: -torch.inf, 199: torch.nan}
    spoilt = gradient.clone()
    for place, value in bad.items():
        spoilt[place] = value
    clean = once(rule, theta, gradient.to(dtype), lr=0.1)
    found = once(rule, theta, spoilt.to(dtype), lr=0.1)
    with on_path(fused=False):
        expected = once(rule, theta, spoilt.to(dtype), lr=0.1)
    others = [i for i in range(200) if i not in (*bad, 77, 150)]
    for ours, theirs, without in zip(found, expected, clean, strict=True):
        assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
        assert torch.equal(ours[others], without[others])


@pytest.mark.parametrize("rule", [ALL_RULES[1], ALL_RULES[-1]], ids=lambda rule: rule.name)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch"])
def test_without_an_average_all_else_is_the_same(rule, fused):
    theta, gradient = torch.linspace(-1, 1, 99), torch.linspace(2, -3, 99)
    with on_path(fused):
        *expected, ema = once(rule, theta, gradient)
        found = once(rule, theta, gradient, averages=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(ema, found[0])  # at decay 0 exactly, though it began elsewhere


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch"])
def test_parameters_are_not_updated_in_place(fused):
    theta = torch.ones(4)
    with on_path(fused), pytest.raises(AssertionError, match="another buffer"):
        apply_rule(SGD(), plan_blocks(4, ()), theta, theta, theta.clone(), [], None, 1, 0, 0)
    assert (theta == 1).all()


@pytest.mark.parametrize(
    ("theta", "gradient"),
    [
        (torch.ones(4, dtype=torch.float64), torch.ones(4)),
        (torch.ones(4), torch.ones(4, dtype=torch.float16)),
        (torch.ones(4), torch.ones(8)[::2]),
        (torch.ones(4, device="meta"), torch.ones(4, device="meta")),
    ],
)
def test_what_the_kernels_do_not_take(theta, gradient):
    assert not kernels.accepts(theta, gradient)
    assert kernels.accepts(torch.ones(4), torch.ones(4, dtype=torch.bfloat16))


@given(cases(), st.integers(1, 12))
@settings(deadline=None)
def test_shares_are_whole_runs_of_blocks_and_about_equal(case, num_shares):
    numel, decayed, block_numel = case
    with patch.object(rules, "BLOCK_NUMEL", block_numel):
        table = plan_blocks(numel, decayed).table
    shares = kernels.cut_shares(table, num_shares)
    assert np.array_equal(np.concatenate(shares), table)
    assert 1 <= len(shares) <= num_shares
    assert all(len(share) for share in shares) or numel == 0
    largest = (table[:, 1] - table[:, 0]).max(initial=0)
    for share in shares:
        assert (share[:, 1] - share[:, 0]).sum() <= numel / num_shares + largest


def test_nothing_is_compiled_after_warming_up():
    kernels.compiled.cache_clear()
    rule = Adam(betas=(0.5, 0.5))
    warm_up(rule, [torch.float32, torch.bfloat16])
    compiled = kernels.compiled.cache_info().misses
    for dtype in (torch.float32, torch.bfloat16):
        once(rule, torch.ones(5), torch.ones(5, dtype=dtype))
        assert len(kernels.compiled(rule.kernel, dtype, True).signatures) == 1
    once(Adam(weight_decay=0.1), torch.ones(5), torch.ones(5), lr=0.3)
    assert kernels.compiled.cache_info().misses == compiled


@by_rule
@by_gradient
def test_all_arithmetic_is_float32_in_registers_of_the_wanted_width(rule, dtype):
    """A float64 that slips in makes the loop three times slower, and changes its roundings."""
    loop = kernels.compiled(rule.kernel, dtype, True)
    code = loop.inspect_llvm(loop.signatures[0])
    assert "fmul <" in code  # vectors
    assert "fpext" not in code
    assert "fmul double" not in code
    assert f'"prefer-vector-width"="{rule.kernel.vector_bits}"' in code


def test_the_number_of_threads_is_torchs_unless_given(monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "run", lambda *arguments: seen.append(arguments[-1]))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 2)
        with ThreadPoolExecutor(1) as pool:  # as a server's calls come: in another thread
            pool.submit(once, SGD(), torch.ones(2), torch.ones(2), num_threads=None).result()
    finally:
        torch.set_num_threads(before)
    once(SGD(), torch.ones(2), torch.ones(2), num_threads=3)
    assert seen == [before + 2, 3]


@pytest.fixture
def no_numba(monkeypatch):
    """A host on which numba is not installed."""
    kernels._import_numba.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    yield
    kernels._import_numba.cache_clear()


@pytest.mark.usefixtures("no_numba")
def test_where_numba_is_missing_one_line_says_so_and_updates_go_on(caplog):
    caplog.set_level(logging.WARNING)
    rule = AdamW(weight_decay=0.1)
    warm_up(rule)
    for _ in range(3):
        found = once(rule, torch.ones(9), torch.ones(9))
    assert [record.name for record in caplog.records] == ["ps.kernels"]
    assert "numba" in caplog.text
    assert len(caplog.messages[0].splitlines()) == 1
    with on_path(fused=False):
        expected = once(rule, torch.ones(9), torch.ones(9))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
