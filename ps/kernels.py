"""Fused updates: one pass for delay compensation, decay, the rule and the EMA, by Numba.

An update is bound by memory, so what counts is that each vector is read and written once. All
arithmetic is float32 and as written (no fast-math, which gains nothing here): the result depends
neither on the number of threads nor on how a vector is cut, and NaN and Inf stay what they are.

Nothing is cached on disk: compiling takes about a second for each process, once, and a cache
would have to be writable, and safe from processes of other versions. Where Numba is missing,
`available` is false and `ps.rules` takes its torch path.
"""

import functools
import importlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Table = NDArray[np.int64]
"""Shape (blocks, 3): first element, the one after the last, whether the elements decay."""

Formula = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any, Any]]
"""(w, g, slot 0, slot 1, constants) to (next w, next slot 0, next slot 1), for one element. All
are float32, which a number written in a formula would not be."""

SHARES_PER_THREAD = 8
"""A thread that other programs hold up then leaves most of its work to the others."""

_NO_FLOATS = np.empty(0, np.float32)


@dataclass(frozen=True)
class Kernel:
    """What is compiled for a rule: constants and slots are handed in, in this order."""

    formula: Formula
    num_slots: int
    num_constants: int
    decoupled: bool = False
    """Whether decay is taken off the parameters, as in AdamW, rather than joined to g."""
    compensates: bool = False
    """Whether g is corrected for what happened to w since it was pulled."""
    vector_bits: int = 256
    """Width of the registers to use, as far as there are such. An update waits for memory, and
    where next to nothing is computed, narrow ones move more bytes a second (docs/update.md)."""


ZERO = np.float32(0)


def lerp_constant(weight: float) -> float:
    """The form in which formulas take a weight in (0, 1] by which something moves to a target.

    They compute start + k (target - start) for k = weight, or target + k (target - start) for
    k = weight - 1 <= 0: as torch.lerp, from the nearer end, so that no weight loses digits.
    """
    return weight if weight < 0.5 else weight - 1


def sgd(w: Any, g: Any, unused_0: Any, unused_1: Any, constants: Any) -> tuple[Any, Any, Any]:
    """Constants: lr."""
    return w - constants[0] * g, unused_0, unused_1


def momentum(w: Any, g: Any, velocity: Any, unused: Any, constants: Any) -> tuple[Any, Any, Any]:
    """Constants: mu, lr."""
    velocity = constants[0] * velocity + g
    return w - constants[1] * velocity, velocity, unused


def nesterov(w: Any, g: Any, velocity: Any, unused: Any, constants: Any) -> tuple[Any, Any, Any]:
    """Constants: mu, lr."""
    velocity = constants[0] * velocity + g
    return w - constants[1] * (g + constants[0] * velocity), velocity, unused


def delayed_nesterov(w: Any, g: Any, v: Any, sum_: Any, constants: Any) -> tuple[Any, Any, Any]:
    """Constants: factors of v, of the sum in v, of v in the step, of g in it, of the sum after."""
    sum_ = sum_ + g
    v = constants[0] * v + constants[1] * sum_
    return w - (constants[2] * v + constants[3] * g), v, constants[4] * sum_


def rmsprop(w: Any, g: Any, mean_square: Any, step: Any, constants: Any) -> tuple[Any, Any, Any]:
    """Constants: lerp_constant(1 - rho), mu, lr, epsilon."""
    k = constants[0]
    mean_square = (mean_square if k > ZERO else g * g) + k * (g * g - mean_square)
    step = constants[1] * step + constants[2] * g / math.sqrt(mean_square + constants[3])
    return w - step, mean_square, step


def adam(w: Any, g: Any, average: Any, square: Any, constants: Any) -> tuple[Any, Any, Any]:
    """Constants: lerp_constant of 1 - beta1 and of 1 - beta2, the step's size, epsilon.

    The last two with the biases corrected, which leaves nothing to correct here.
    """
    k, k_square = constants[0], constants[1]
    average = (average if k > ZERO else g) + k * (g - average)
    square = (square if k_square > ZERO else g * g) + k_square * (g * g - square)
    return w - constants[2] * average / (math.sqrt(square) + constants[3]), average, square


def _widen_float32(value: Any) -> Any:
    return value


def _widen_bfloat16(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


_WIDEN = {torch.float32: _widen_float32, torch.bfloat16: _widen_bfloat16}


def _as_it_is(g: Any, w: Any, pulled: Any, weight: Any) -> Any:
    return g


def _compensated(g: Any, w: Any, pulled: Any, weight: Any) -> Any:
    # Without a product of two gradients alone, which might overflow.
    return g + weight * (w - pulled) * g * g


def _make_loop(
    formula: Formula,
    widen: Callable[[Any], Any],
    correct: Callable[[Any, Any, Any, Any], Any],
    set_vector_width: Callable[[], None],
    kernel: Kernel,
    averages: bool,
) -> Callable[..., None]:
    """The loop in Python; what it closes over is constant when it is compiled.

    Each block is a slice, whose elements the compiler knows to be in range: it can vectorise.
    """
    has_first, has_second = kernel.num_slots > 0, kernel.num_slots > 1
    couples, decouples = not kernel.decoupled, kernel.decoupled

    def update(
        blocks: Table,
        theta: Floats,
        out: Floats,
        gradient: NDArray[Any],
        ema: Floats,
        first: Floats,
        second: Floats,
        constants: tuple[np.float32, ...],
        decay: np.float32,
        ema_constant: np.float32,
        pulled: Floats,
        compensation: np.float32,
    ) -> None:
        set_vector_width()
        for row in range(blocks.shape[0]):
            start, stop = blocks[row, 0], blocks[row, 1]
            decays = blocks[row, 2] != 0 and decay > ZERO
            w, w_out, g, average = theta[start:stop], out[start:stop], gradient[start:stop], ema
            if averages:
                average = ema[start:stop]
            slot_0 = first[start:stop] if has_first else first
            slot_1 = second[start:stop] if has_second else second
            w_pulled = pulled[start:stop]
            for i in range(w.shape[0]):
                before = w[i]
                slope = correct(widen(g[i]), before, w_pulled[i], compensation)
                if couples and decays:
                    slope = slope + decay * before
                a = slot_0[i] if has_first else ZERO
                b = slot_1[i] if has_second else ZERO
                after, a, b = formula(before, slope, a, b, constants)
                if decouples and decays:
                    after = after - decay * before
                if has_first:
                    slot_0[i] = a
                if has_second:
                    slot_1[i] = b
                w_out[i] = after
                if averages:
                    base = average[i] if ema_constant > ZERO else after
                    average[i] = base + ema_constant * (after - average[i])

    return update


@functools.cache
def _import_numba() -> ModuleType | None:
    # Numba raises ImportError for a numpy that is too new for it, and OSError if LLVM can't load.
    try:
        return importlib.import_module("numba")
    except (ImportError, OSError) as error:
        _log.warning("numba cannot be imported (%s): updates run as separate torch ops", error)
        return None


def available() -> bool:
    """Whether there is a Numba; the first call imports it, and logs a line if there is none."""
    return _import_numba() is not None


def accepts(theta: Tensor, gradient: Tensor) -> bool:
    """Whether vectors like these are for the kernels: float32 in the host's memory."""
    return (
        theta.dtype == torch.float32
        and gradient.dtype in _WIDEN
        and theta.device.type == gradient.device.type == "cpu"
        and theta.is_contiguous()
        and gradient.is_contiguous()
        and available()
    )


def _vector_width(numba: Any, bits: int) -> Any:
    """What a compiled function calls, to no effect but that its loops are made for this width."""

    @numba.extending.intrinsic  # type: ignore[untyped-decorator]
    def set_vector_width(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            # llvmlite's own `add` refuses attributes that are LLVM's only as strings.
            set.add(builder.function.attributes, f'"prefer-vector-width"="{bits}"')
            return context.get_dummy_value()

        return numba.void(), generate

    return set_vector_width


@functools.cache
def compiled(kernel: Kernel, gradient: torch.dtype, averages: bool) -> Callable[..., None]:
    """The machine code of a kernel for gradients of a dtype, with or without an EMA."""
    numba: Any = _import_numba()
    assert numba is not None, "ask `accepts` first"
    jit = functools.partial(numba.njit, nogil=True, error_model="numpy")
    formula, widen = jit(kernel.formula), jit(_WIDEN[gradient])
    correct = jit(_compensated if kernel.compensates else _as_it_is)
    width = _vector_width(numba, kernel.vector_bits)
    loop = _make_loop(formula, widen, correct, width, kernel, averages)
    floats, real = numba.float32[::1], numba.float32
    gradients = floats if gradient == torch.float32 else numba.uint16[::1]
    constants = numba.types.UniTuple(real, kernel.num_constants)
    table = numba.int64[:, ::1]
    scalars = (constants, real, real)
    arguments = (table, floats, floats, gradients, *[floats] * 3, *scalars, floats, real)
    # Types are fixed: a float64 that slipped in would make the whole loop float64.
    machine_code: Callable[..., None] = jit(numba.void(*arguments))(loop)
    return machine_code


@functools.cache
def _threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="update")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child inherits no threads


def run(
    kernel: Kernel,
    blocks: Table,
    theta: Tensor,
    out: Tensor,
    gradient: Tensor,
    slots: Sequence[Tensor],
    ema: Tensor | None,
    constants: Sequence[float],
    decay: float,
    ema_weight: float,
    pulled: Tensor | None,
    compensation: float,
    num_threads: int,
) -> None:
    """Update whole vectors, which `accepts` must have admitted, with this number of threads.

    `decay` multiplies the parameters of blocks that decay; `ema` moves by `ema_weight` of its
    distance from the next parameters. With `pulled`, g is first corrected to
    g + compensation * g * g * (theta - pulled); the kernel must be one that compensates.
    """
    assert kernel.compensates == (pulled is not None)
    update = compiled(kernel, gradient.dtype, ema is not None)
    first, second = (*(_array(slot) for slot in slots), _NO_FLOATS, _NO_FLOATS)[:2]
    averages = _NO_FLOATS if ema is None else _array(ema)
    vectors = (_array(theta), _array(out), _array(gradient), averages, first, second)
    ema_constant = np.float32(lerp_constant(ema_weight))
    scalars = (tuple(map(np.float32, constants)), np.float32(decay), ema_constant)
    delay = (_array(theta if pulled is None else pulled), np.float32(compensation))
    shares = cut_shares(blocks, SHARES_PER_THREAD * num_threads if num_threads > 1 else 1)
    if len(shares) == 1:
        update(blocks, *vectors, *scalars, *delay)
    else:
        arguments = (*vectors, *scalars, *delay)
        calls = _threads(num_threads).map(lambda share: update(share, *arguments), shares)
        for _ in calls:  # an error in a thread is raised here
            pass


def cut_shares(blocks: Table, num_shares: int) -> list[Table]:
    """At most `num_shares` runs of whole blocks, about equal in elements, none of them empty."""
    if num_shares == 1 or len(blocks) <= 1:
        return [blocks]
    stops = blocks[:, 1]
    wanted = stops[-1] * np.arange(1, num_shares) // num_shares
    cuts = np.unique(np.searchsorted(stops, wanted) + 1)
    return [share for share in np.split(blocks, cuts) if len(share)]


def _array(vector: Tensor) -> NDArray[Any]:
    """The vector's memory; bf16, which numpy lacks, as its bits."""
    vector = vector.detach()
    if vector.dtype == torch.bfloat16:
        return vector.view(torch.int16).numpy().view(np.uint16)
    return vector.numpy()
