"""Time of one update of Xception's 22.9 M parameters: fused kernels, torch ops, and C.

The C loops do the same with the same blocks, compiled when the benchmark starts. Rounds interleave
everything with a memcpy of the parameters; what is reported are medians with quartiles, and
medians of the ratios within a round, since absolute figures swing with the machine's load.
`cpu_ms` is processor time, which time spent waiting for a core does not add to. Prints one line
`RESULT {json}` for each row.
"""

import ctypes
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
from torch import Tensor

from model.flat import parameter_segments
from model.registry import create_model
from ps import kernels
from ps.layout import plan_layout
from ps.rules import SGD, Adam, AdamW, Blocks, Momentum, RMSprop, Rule, apply_rule, plan_blocks

LR, DECAY, EMA_DECAY, UPDATES = 1e-6, 1e-5, 0.9999, 1000
WORKS: dict[str, tuple[Rule, bool]] = {
    "sgd": (SGD(), False),
    "sgd + decay + EMA": (SGD(weight_decay=DECAY), True),
    "momentum + decay + EMA": (Momentum(weight_decay=DECAY), True),
    "rmsprop + decay + EMA": (RMSprop(weight_decay=DECAY), True),
    "adam + decay + EMA": (Adam(weight_decay=DECAY), True),
    "adamw + decay + EMA": (AdamW(weight_decay=DECAY), True),
}
"""Rules, and whether an EMA is kept."""

C_FLAGS = {"-O3": ["-O3"], "-O3 native fast": ["-O3", "-march=native", "-ffast-math"]}

C_SOURCE = """
#include <math.h>
#include <stdint.h>

#define UPDATE(NAME, SLOTS, AVERAGES, DECOUPLED, FORMULA) \\
static __attribute__((noinline)) void NAME##_block(int64_t n, int decays, \\
    const float *restrict theta, float *restrict out, const float *restrict gradient, \\
    float *restrict ema, float *restrict first, float *restrict second, \\
    float c0, float c1, float c2, float c3, float decay, float k) { \\
  for (int64_t i = 0; i < n; i++) { \\
    float w = theta[i], g = gradient[i], next; \\
    float a = SLOTS > 0 ? first[i] : 0.0f, b = SLOTS > 1 ? second[i] : 0.0f; \\
    if (decays && !DECOUPLED) g += decay * w; \\
    FORMULA \\
    if (decays && DECOUPLED) next -= decay * w; \\
    if (SLOTS > 0) first[i] = a; \\
    if (SLOTS > 1) second[i] = b; \\
    out[i] = next; \\
    if (AVERAGES) ema[i] += k * (next - ema[i]); \\
  } \\
} \\
void NAME(const int64_t *blocks, int64_t rows, const float *theta, float *out, \\
    const float *gradient, float *ema, float *first, float *second, const float *c, \\
    float decay, float k) { \\
  for (int64_t row = 0; row < rows; row++) { \\
    int64_t at = blocks[3 * row], n = blocks[3 * row + 1] - at; \\
    NAME##_block(n, blocks[3 * row + 2] && decay > 0.0f, theta + at, out + at, gradient + at, \\
        ema + at, first + at, second + at, c[0], c[1], c[2], c[3], decay, k); \\
  } \\
}
#define ADAM a += c0 * (g - a); b += c1 * (g * g - b); next = w - c2 * a / (sqrtf(b) + c3);

UPDATE(sgd, 0, 0, 0, next = w - c0 * g;)
UPDATE(sgd_ema, 0, 1, 0, next = w - c0 * g;)
UPDATE(momentum_ema, 1, 1, 0, a = c0 * a + g; next = w - c1 * a;)
UPDATE(rmsprop_ema, 2, 1, 0,
    a += c0 * (g * g - a); b = c1 * b + c2 * g / sqrtf(a + c3); next = w - b;)
UPDATE(adam_ema, 2, 1, 0, ADAM)
UPDATE(adamw_ema, 2, 1, 1, ADAM)
"""


@dataclass
class Memory:
    """All vectors that updates run on; the same ones for every variant."""

    blocks: Blocks
    theta: Tensor
    out: Tensor
    gradient: Tensor
    ema: Tensor
    spare: tuple[Tensor, Tensor]
    bf16: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.bf16 = self.gradient.bfloat16()

    def slots(self, rule: Rule) -> list[Tensor]:
        """Two of the vectors, or fewer."""
        return list(self.spare[: len(rule.slots)])

    def reset(self, rule: Rule) -> None:
        """The state before a first update."""
        self.ema.copy_(self.theta)
        for slot, first in zip(self.slots(rule), rule.slots.values(), strict=True):
            slot.fill_(first)


def _memory() -> Memory:
    with torch.device("meta"):
        segments = parameter_segments(create_model("xception", 1000))
    (shard,) = plan_layout(segments, (), 1).shards
    numel = shard.parameters.numel
    generator = torch.Generator().manual_seed(0)
    theta, gradient = (torch.randn(numel, generator=generator) for _ in range(2))
    rest = [torch.ones(numel) for _ in range(4)]
    blocks = plan_blocks(numel, shard.decayed)
    return Memory(blocks, theta, rest[0], gradient, rest[1], (rest[2], rest[3]))


Call = Callable[[], Any]


def _ours(memory: Memory, rule: Rule, averages: bool, gradient: Tensor, threads: int) -> Call:
    ema = memory.ema if averages else None
    slots = memory.slots(rule)
    vectors = (memory.blocks, memory.theta, memory.out, gradient, slots, ema)
    return lambda: apply_rule(rule, *vectors, LR, EMA_DECAY, UPDATES, threads)


def _in_torch(memory: Memory, rule: Rule, averages: bool) -> Call:
    call = _ours(memory, rule, averages, memory.gradient, 1)

    def update() -> None:
        with patch.object(kernels, "available", return_value=False):
            call()

    return update


def _in_c(library: ctypes.CDLL, memory: Memory, rule: Rule, averages: bool) -> Call:
    function = library[rule.name + ("_ema" if averages else "")]
    table = memory.blocks.table
    vectors = (memory.theta, memory.out, memory.gradient, memory.ema, *memory.spare)
    pointers = [ctypes.c_void_p(vector.data_ptr()) for vector in vectors]
    constants = np.zeros(4, np.float32)
    given = rule.constants(LR, UPDATES)
    constants[: len(given)] = given
    arguments = (ctypes.c_void_p(table.ctypes.data), ctypes.c_int64(len(table)), *pointers)
    scalars = (ctypes.c_float(rule.decay(LR)), ctypes.c_float(1 - EMA_DECAY))
    return lambda: function(*arguments, ctypes.c_void_p(constants.ctypes.data), *scalars)


def _compile(folder: Path) -> dict[str, ctypes.CDLL]:
    """The C loops by compiler flags; none where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        print("no C rows: there is no `cc` on this machine")
        return {}
    source = folder / "update.c"
    source.write_text(C_SOURCE)
    libraries = {}
    for index, (name, flags) in enumerate(C_FLAGS.items()):
        path = folder / f"update{index}.so"
        subprocess.run([compiler, *flags, "-shared", "-fPIC", source, "-o", path], check=True)
        libraries[name] = ctypes.CDLL(str(path))
    return libraries


def _variants(
    memory: Memory, rule: Rule, averages: bool, libraries: dict[str, ctypes.CDLL]
) -> dict[str, Call]:
    def ours(gradient: Tensor, threads: int) -> Call:
        return _ours(memory, rule, averages, gradient, threads)

    in_c = {f"C {n}": _in_c(library, memory, rule, averages) for n, library in libraries.items()}
    return {
        "memcpy": lambda: memory.out.copy_(memory.theta),
        **in_c,
        "fused": ours(memory.gradient, 1),
        "fused, 2 threads": ours(memory.gradient, 2),
        "fused, bf16 gradient": ours(memory.bf16, 1),
        "torch ops": _in_torch(memory, rule, averages),
    }


def _check(memory: Memory, rule: Rule, variants: dict[str, Call]) -> None:
    """All variants do the same work."""
    found = {}
    for name, call in variants.items():
        if "bf16" not in name and name != "memcpy":
            memory.reset(rule)
            call()
            found[name] = [vector.clone() for vector in (memory.out, memory.ema)]
    for name, vectors in found.items():
        for vector, expected in zip(vectors, found["torch ops"], strict=True):
            torch.testing.assert_close(vector, expected, rtol=1e-6, atol=1e-6, msg=name)
    memory.reset(rule)


@dataclass
class _Timing:
    """Seconds by round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, call: Call) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def _time(variants: dict[str, Call], num_rounds: int) -> dict[str, _Timing]:
    timings = {name: _Timing() for name in variants}
    order = list(variants)
    for round_ in range(num_rounds + 1):
        for name in order:
            timings[name].add(variants[name])
        order = [*order[1:], order[0]]  # each follows another one, which leaves other caches
        if round_ == 0:  # the first one warms up
            timings = {name: _Timing() for name in variants}
    return timings


def _row(timing: _Timing, others: dict[str, _Timing]) -> dict[str, Any]:
    low, median, high = (round(1e3 * s, 2) for s in statistics.quantiles(timing.wall, n=4))
    row = {"ms": median, "ms_quartiles": [low, high]}
    row["cpu_ms"] = round(1e3 * statistics.median(timing.cpu), 2)
    for name, other in others.items():
        row[f"x {name}"] = _ratio(timing.wall, other.wall)
        row[f"x {name}, cpu"] = _ratio(timing.cpu, other.cpu)
    return row


def _ratio(values: list[float], base: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(values, base, strict=True)), 3)


def _report(what: str, timings: dict[str, _Timing], num_rounds: int) -> None:
    bases = {name: t for name, t in timings.items() if name == "memcpy" or name.startswith("C ")}
    for name, timing in timings.items():
        row = {"what": what, "variant": name, "rounds": num_rounds, **_row(timing, bases)}
        print("RESULT", json.dumps(row), flush=True)


def _finite_checks(memory: Memory) -> dict[str, Call]:
    return {
        "memcpy": lambda: memory.out.copy_(memory.theta),
        "aminmax": lambda: torch.aminmax(memory.gradient),
        "aminmax, bf16": lambda: torch.aminmax(memory.bf16),
    }


@click.command()
@click.option("--rounds", default=15, show_default=True, help="Rounds that are counted.")
@click.option("--work", "works", multiple=True, type=click.Choice(list(WORKS)), help="Only these.")
def main(rounds: int, works: tuple[str, ...]) -> None:
    """Time of one update of 22.9 M parameters, beside torch ops and the same loop in C."""
    torch.set_num_threads(1)
    memory = _memory()
    with tempfile.TemporaryDirectory() as folder:
        libraries = _compile(Path(folder))
        for work in works or WORKS:
            rule, averages = WORKS[work]
            variants = _variants(memory, rule, averages, libraries)
            _check(memory, rule, variants)
            _report(work, _time(variants, rounds), rounds)
    _report("finite check", _time(_finite_checks(memory), rounds), rounds)


if __name__ == "__main__":
    main()
