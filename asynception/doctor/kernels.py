"""Whether the update kernels compile here, and compute what they are to."""

import time

import torch

from asynception.doctor.finding import Verdict, fail, ok, warn
from ps import kernels
from ps.rules import Momentum, apply_rule, plan_blocks

_NUMEL = 1000
_LR, _MU = 0.1, 0.9


def measure_kernels() -> Verdict:
    """Compile the kernel of momentum and let it do an update whose outcome is known."""
    if not kernels.available():
        return judge_kernels(available=False, compile_s=0.0, error=0.0)
    started_s = time.perf_counter()
    theta, gradient = torch.linspace(-1, 1, _NUMEL), torch.linspace(2, 3, _NUMEL)
    out, velocity = torch.full((_NUMEL,), torch.nan), torch.ones(_NUMEL)  # old memory may be right
    blocks = plan_blocks(_NUMEL, ())
    apply_rule(
        Momentum(momentum=_MU), blocks, theta, out, gradient, [velocity], None, _LR, 0.0, 0, 1
    )
    took_s = time.perf_counter() - started_s
    expected = theta - _LR * (_MU + gradient)
    return judge_kernels(True, took_s, float((out - expected).abs().max()))


def judge_kernels(available: bool, compile_s: float, error: float) -> Verdict:
    """`error`: the largest deviation from the update that was expected; NaN is one as well."""
    if not available:
        return warn(
            "no Numba: updates run as separate torch ops, which are slower (docs/update.md)",
            "pip install numba, of a version that takes this numpy",
        )
    if not error <= 1e-5:
        return fail(
            f"an update by Numba is off by {error:.3g}",
            "install the versions of numba and llvmlite in constraints.txt",
        )
    return ok(f"Numba compiled an update in {compile_s:.1f} s")
