"""Optimizer rules and the EMA against values by hand, an independent reference, and torch.

float64 always takes the path of torch ops. Where float32 is used, tests run on both paths;
`test_kernels.py` has more of what is particular to the fused one.
"""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from update_reference import reference

from ps import kernels, rules
from ps.layout import Range
from ps.rules import SGD, Adam, AdamW, Ema, Momentum, RMSprop, Rule, apply_rule, plan_blocks

ALL_RULES = [
    SGD(weight_decay=0.01),
    Momentum(momentum=0.9, weight_decay=0.01),
    Momentum(momentum=0.9, nesterov=True, weight_decay=0.01),
    RMSprop(rho=0.9, momentum=0.9, epsilon=1.0, weight_decay=0.01),
    RMSprop(rho=0.95, momentum=0.0, epsilon=1e-3, weight_decay=0.01),
    Adam(weight_decay=0.01),
    AdamW(betas=(0.8, 0.95), epsilon=1e-3, weight_decay=0.1),
]
by_rule = pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: f"{rule.name}")


@pytest.fixture(params=["fused", "torch"])
def path(request, monkeypatch):
    """Both ways of doing an update."""
    monkeypatch.setattr(kernels, "available", lambda: request.param == "fused")
    return request.param


class Run:
    """A vector that is trained by `apply_rule`, one gradient at a time."""

    def __init__(self, rule, theta, decayed=(), ema_decay=0.9):
        self.rule, self.ema_decay = rule, ema_decay
        self.theta, self.ema = theta.clone(), theta.clone()
        self.slots = [torch.full_like(theta, first) for first in rule.slots.values()]
        self.blocks = plan_blocks(theta.numel(), decayed)
        self.updates = 0

    def step(self, gradient, lr):
        out = torch.full_like(self.theta, torch.nan)
        apply_rule(
            self.rule,
            self.blocks,
            self.theta,
            out,
            gradient,
            self.slots,
            self.ema,
            lr,
            self.ema_decay,
            self.updates,
        )
        self.theta = out
        self.updates += 1

    @property
    def vectors(self):
        return [self.theta, self.ema, *self.slots]


def scalar_run(rule, theta, steps):
    """The parameter after each (gradient, lr), in float64."""
    run, found = Run(rule, torch.tensor([theta], dtype=torch.float64)), []
    for gradient, lr in steps:
        run.step(torch.tensor([gradient], dtype=torch.float64), lr)
        found.append(run.theta.item())
    return found


def test_sgd_by_hand():
    """w = 1; 1 - 0.1 * 2 = 0.8; 0.8 + 0.1 * 1 = 0.9; 0.9 - 0.01 * 4 = 0.86."""
    found = scalar_run(SGD(), 1.0, [(2, 0.1), (-1, 0.1), (4, 0.01)])
    assert found == pytest.approx([0.8, 0.9, 0.86], abs=1e-12)


def test_momentum_by_hand():
    """v = mu v + g; w -= lr v, with mu = 0.5 and w = 1.

    step 1: g = 2, lr = 0.1:  v = 2,           w = 1 - 0.2 = 0.8
    step 2: g = 1, lr = 0.1:  v = 1 + 1 = 2,   w = 0.8 - 0.2 = 0.6
    step 3: g = 4, lr = 0.01: v = 1 + 4 = 5,   w = 0.6 - 0.05 = 0.55
    With lr inside of v, as in Keras, step 3 would give v = 0.1 + 0.04 = 0.14 and w = 0.46.
    """
    found = scalar_run(Momentum(momentum=0.5), 1.0, [(2, 0.1), (1, 0.1), (4, 0.01)])
    assert found == pytest.approx([0.8, 0.6, 0.55], abs=1e-12)


def test_rmsprop_by_hand():
    """ms += (1 - rho)(g^2 - ms); mom = mu mom + lr g / sqrt(ms + eps); w -= mom.

    rho = 3/4, mu = 1/2, eps = 1, ms = 1, w = 5; the gradients make every root rational:
    step 1: g = 3,    lr = 0.7:   ms = (3 * 1 + 9) / 4 = 3;                root of 4 is 2
            mom = 0.7 * 3 / 2 = 1.05;                                      w = 3.95
    step 2: g = 6,    lr = 0.7:   ms = (3 * 3 + 36) / 4 = 11.25;           root of 12.25 is 3.5
            mom = 0.525 + 0.7 * 6 / 3.5 = 1.725;                           w = 2.225
    step 3: g = 37.5, lr = 0.038: ms = (33.75 + 1406.25) / 4 = 360;        root of 361 is 19
            mom = 0.8625 + 0.038 * 37.5 / 19 = 0.9375;                     w = 1.2875
    """
    rule = RMSprop(rho=0.75, momentum=0.5, epsilon=1.0)
    found = scalar_run(rule, 5.0, [(3, 0.7), (6, 0.7), (37.5, 0.038)])
    assert found == pytest.approx([3.95, 2.225, 1.2875], abs=1e-12)


def test_nesterov_by_hand():
    """v = mu v + g; w -= lr (g + mu v): v = 2, w = 1 - 0.1 * 3 = 0.7; v = 2, w = 0.7 - 0.1 * 2."""
    found = scalar_run(Momentum(momentum=0.5, nesterov=True), 1.0, [(2, 0.1), (1, 0.1)])
    assert found == pytest.approx([0.7, 0.5], abs=1e-12)


def test_adam_by_hand():
    """m += (1 - b1)(g - m); v += (1 - b2)(g^2 - v); w -= lr (m / c1) / (sqrt(v / c2) + eps).

    b1 = 1/2, b2 = 3/4, eps = 1, w = 5, lr = 0.3:
    step 1: g = 4: m = 2, v = 4; c1 = 1/2, c2 = 1/4: 4 / (4 + 1) = 0.8;      w = 5 - 0.24 = 4.76
    step 2: g = 4: m = 3, v = 7; c1 = 3/4, c2 = 7/16: 4 / (4 + 1) = 0.8;     w = 4.52
    """
    found = scalar_run(Adam(betas=(0.5, 0.75), epsilon=1.0), 5.0, [(4, 0.3), (4, 0.3)])
    assert found == pytest.approx([4.76, 4.52], abs=1e-12)


def test_decoupled_decay_by_hand():
    """w is 4 and its gradient 0: adamw takes off lr * wd * 4 = 0.1 * 0.5 * 4 = 0.2."""
    theta = torch.tensor([4.0, 4.0], dtype=torch.float64)
    run = Run(AdamW(weight_decay=0.5), theta, decayed=(Range(1, 2),))
    run.step(torch.zeros(2, dtype=torch.float64), 0.1)
    assert run.theta.tolist() == pytest.approx([4.0, 3.8], abs=1e-12)


def test_weight_decay_by_hand():
    """Half of the squares: g = 2 + 0.5 * 4 = 4; w = 4 - 0.1 * 4 = 3.6. Undecayed: 4 - 0.2 = 3.8."""
    theta = torch.tensor([4.0, 4.0], dtype=torch.float64)
    run = Run(SGD(weight_decay=0.5), theta, decayed=(Range(1, 2),))
    run.step(torch.tensor([2.0, 2.0], dtype=torch.float64), 0.1)
    assert run.theta.tolist() == pytest.approx([3.8, 3.6], abs=1e-12)


def test_ema_by_hand():
    """ema = 0.75 ema + 0.25 theta: theta 10, 6, -2 give 10, 9, 6.25."""
    run = Run(SGD(), torch.tensor([10.0], dtype=torch.float64), ema_decay=0.75)
    averages = []
    for gradient in (4.0, 8.0):
        run.step(torch.tensor([gradient], dtype=torch.float64), 1.0)
        averages.append(run.ema.item())
    assert averages == pytest.approx([9.0, 6.25], abs=1e-12)


DECAYED = (Range(3, 40), Range(40, 77), Range(90, 91), Range(120, 150))
NUMEL, STEPS = 150, 100


def hundred_steps(rule, dtype):
    """100 random steps, the lr a tenth in the second half; returns what was found and expected."""
    random = np.random.default_rng(7)
    theta = random.normal(size=NUMEL)
    gradients = random.normal(size=(STEPS, NUMEL)) * random.choice([0.1, 1, 10], size=(STEPS, 1))
    lrs = [0.1] * (STEPS // 2) + [0.01] * (STEPS // 2)
    mask = np.zeros(NUMEL, bool)
    for span in DECAYED:
        mask[span.start : span.stop] = True
    run = Run(rule, torch.tensor(theta, dtype=dtype), DECAYED, ema_decay=0.97)
    for gradient, lr in zip(gradients, lrs, strict=True):
        run.step(torch.tensor(gradient, dtype=dtype), lr)
    found = [vector.numpy() for vector in run.vectors]
    return found, reference(rule, theta, mask, gradients, lrs, ema_decay=0.97)[-1]


@by_rule
def test_float64_equals_the_reference(rule):
    found, expected = hundred_steps(rule, torch.float64)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@by_rule
@pytest.mark.usefixtures("path")
def test_float32_equals_the_reference_up_to_rounding(rule):
    """Each of the 100 steps rounds a few times by up to 2**-24 of the largest value in it."""
    found, expected = hundred_steps(rule, torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        largest = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=4 * STEPS * 2**-24 * largest)


@pytest.mark.usefixtures("path")
def test_weight_decay_moves_kernels_only():
    theta = torch.full((NUMEL,), 2.0)
    run = Run(SGD(weight_decay=0.5), theta, DECAYED)
    run.step(torch.zeros(NUMEL), 1.0)
    expected = theta.clone()
    for span in DECAYED:
        expected[span.slice()] = 1.0
    assert torch.equal(run.theta, expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_in_torch_ops_equals_torch_sgd_bit_for_bit(nesterov, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    torch.manual_seed(3)
    theta = torch.randn(64)
    kernel, bias = theta[:40].clone().requires_grad_(), theta[40:].clone().requires_grad_()
    groups = [
        {"params": [kernel], "weight_decay": 0.01},
        {"params": [bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov, foreach=False)
    rule = Momentum(momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    run = Run(rule, theta, (Range(0, 40),))
    for step in range(50):
        gradient, lr = torch.randn(64), 0.1 if step < 25 else 0.01
        kernel.grad, bias.grad = gradient[:40].clone(), gradient[40:].clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        run.step(gradient, lr)
        assert torch.equal(run.theta, torch.cat([kernel, bias]).detach())


def random_steps(rule, numel, decayed, block_numel):
    generator = torch.Generator().manual_seed(numel)
    with patch.object(rules, "BLOCK_NUMEL", block_numel):
        run = Run(rule, torch.randn(numel, generator=generator), decayed)
    for lr in (0.1, 0.1, 0.01):
        run.step(torch.randn(numel, generator=generator), lr)
    return run.vectors


def assert_same(vectors, others):
    assert all(torch.equal(a, b) for a, b in zip(vectors, others, strict=True))


@by_rule
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("block_numel", [1, 2, 7, 16, 64, 149, 150, 151])
def test_small_blocks_change_no_bit(rule, block_numel):
    whole = random_steps(rule, NUMEL, DECAYED, block_numel=10**9)
    assert_same(random_steps(rule, NUMEL, DECAYED, block_numel), whole)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("rule", [Momentum(weight_decay=0.1), RMSprop(weight_decay=0.1)])
@pytest.mark.parametrize("offset", [-1, 0, 1, 1 << 18])
def test_sizes_around_the_block_size_change_no_bit(rule, offset):
    numel = rules.BLOCK_NUMEL + offset
    decayed = (Range(5, numel - 3),)
    whole = random_steps(rule, numel, decayed, block_numel=10**9)
    assert_same(random_steps(rule, numel, decayed, rules.BLOCK_NUMEL), whole)


@st.composite
def decayed_ranges(draw):
    numel = draw(st.integers(0, 200))
    borders = sorted(draw(st.lists(st.integers(0, numel), unique=True, max_size=12)))
    pairs = zip(borders[::2], borders[1::2], strict=False)
    touching = draw(st.booleans())  # neighbouring kernels with no padding between them
    ranges = [Range(start, stop) for start, stop in pairs]
    if touching and ranges and ranges[-1].numel > 1:
        last = ranges.pop()
        ranges += [Range(last.start, last.start + 1), Range(last.start + 1, last.stop)]
    return numel, tuple(ranges)


@given(decayed_ranges(), st.integers(1, 60))
@settings(deadline=None)
def test_blocks_cover_all_elements_once_with_the_right_decay(case, block_numel):
    numel, decayed = case
    with patch.object(rules, "BLOCK_NUMEL", block_numel):
        blocks = plan_blocks(numel, decayed)
    mask = np.zeros(numel, bool)
    for span in decayed:
        mask[span.slice()] = True
    position = 0
    for block in blocks:
        assert block.span.start == position
        assert 0 < block.span.stop - block.span.start <= block_numel
        assert (mask[block.span] == block.decayed).all()
        position = block.span.stop
    assert position == numel


@by_rule
@pytest.mark.usefixtures("path")
def test_published_parameters_and_gradient_are_only_read(rule):
    """`out` shares no memory with `theta`, and what it held before doesn't matter."""
    theta = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1))
    kept, gradient = theta.clone(), torch.ones(NUMEL)
    outs = []
    for garbage in (torch.nan, torch.inf, 3.0):
        out = torch.full((NUMEL,), garbage)
        slots = [torch.full((NUMEL,), first) for first in rule.slots.values()]
        blocks = plan_blocks(NUMEL, DECAYED)
        apply_rule(rule, blocks, theta, out, gradient, slots, theta.clone(), 0.1, 0.9, 0)
        assert torch.equal(theta, kept)
        assert (gradient == 1).all()
        outs.append(out)
    assert_same(outs[1:], outs[:1] * 2)
    assert not torch.equal(outs[0], kept)


@pytest.mark.parametrize(
    ("updates", "expected"),
    [(0, 1 / 10), (1, 2 / 11), (8, 9 / 18), (90, 91 / 100), (89_990, 0.9999), (10**9, 0.9999)],
)
def test_ema_warmup_is_tfs_num_updates(updates, expected):
    assert Ema(decay=0.9999, warmup=True).rate(updates) == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 10**9))
@settings(deadline=None)
def test_ema_without_warmup_is_constant(updates):
    assert Ema(decay=0.9999).rate(updates) == 0.9999


ANY_RULE = TypeAdapter(Rule)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("weight_decay", {"name": "sgd", "weight_decay": -1e-4}),
        ("momentum", {"name": "momentum", "momentum": 1}),
        ("momentum", {"name": "momentum", "momentum": -0.1}),
        ("rho", {"name": "rmsprop", "rho": 1}),
        ("epsilon", {"name": "rmsprop", "epsilon": 0}),
        ("momentum", {"name": "sgd", "momentum": 0.9}),  # SGD has none
        ("betas", {"name": "adam", "betas": [0.9, 1.0]}),
        ("betas", {"name": "adamw", "betas": [0.9]}),
        ("epsilon", {"name": "adam", "epsilon": 0}),
    ],
)
def test_refused_settings(field, values):
    with pytest.raises(ValidationError) as refused:
        ANY_RULE.validate_python(values)
    (error,) = refused.value.errors()
    assert field in error["loc"]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_an_average_that_never_moves_or_flips_is_refused(decay):
    with pytest.raises(ValidationError, match="decay"):
        Ema(decay=decay)
