"""The sparse multilabel loss against binary_cross_entropy_with_logits and its dense target.

Forward and backward from given float32 logits, on the CPU, three ways: `sparse`, ours; `dense`,
PyTorch's with a target that is built from the same lists in each batch, as training must; `dense,
target at hand`, without what that takes. Rounds interleave the three, each round starts with
another, and what is reported are medians with the quartiles, and ratios to ours of the same
round. All run as a worker does: memory is kept between batches (`ps.malloc`).

Memory is the growth of the peak resident set over one batch, read from the kernel (VmHWM in
/proc/self/status, reset through /proc/self/clear_refs, so Linux only), in a fresh process for
each way, where malloc maps every block of 64 KiB or more anew, so that none hides in memory that
was there before. Logits are not counted, their gradient is. Prints one line `RESULT {json}` for
each way.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from ps.malloc import tune_malloc
from worker.data.labels import LabelLists
from worker.objective import create_objective

WAYS = ("sparse", "dense", "dense, target at hand")
MAPPED_BYTES = 65536


class _Batch:
    """Random logits and labels, and each way's loss of them."""

    def __init__(self, batch_size: int, classes: int, labels: int) -> None:
        generator = random.Random(0)
        lists = [generator.sample(range(classes), labels) for _ in range(batch_size)]
        torch.manual_seed(0)
        self.logits = torch.randn(batch_size, classes).mul_(3).sub_(6).requires_grad_()
        self._labels = LabelLists.from_lists(lists)
        self._objective = create_objective("multilabel", classes)

    def loss(self, way: str) -> Callable[[], Tensor]:
        """A function that computes the mean loss."""
        if way == "sparse":
            return lambda: self._objective.loss(self.logits, self._labels)
        if way == "dense":
            return lambda: self._dense(self._target())
        target = self._target()
        return lambda: self._dense(target)

    def _target(self) -> Tensor:
        target = torch.zeros(self.logits.shape)
        target[self._labels.rows(), self._labels.ids] = 1
        return target

    def _dense(self, target: Tensor) -> Tensor:
        total = F.binary_cross_entropy_with_logits(self.logits, target, reduction="sum")
        return total / len(target)

    def step(self, loss: Callable[[], Tensor]) -> tuple[float, float]:
        """Seconds of forward and of backward. The gradient stays until the next step."""
        self.logits.grad = None
        start_s = time.perf_counter()
        value = loss()
        forward_s = time.perf_counter() - start_s
        torch.autograd.backward(value)
        return forward_s, time.perf_counter() - start_s - forward_s


def _time(batch: _Batch, num_rounds: int) -> dict[str, dict[str, Any]]:
    losses = {way: batch.loss(way) for way in WAYS}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(-3, num_rounds):  # the first three warm up
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            step = batch.step(losses[way])
            if number >= 0:
                seconds[way].append(step)
    ours = [sum(step) for step in seconds[WAYS[0]]]
    return {way: _row(steps, ours) for way, steps in seconds.items()}


def _row(steps: list[tuple[float, float]], ours: list[float]) -> dict[str, Any]:
    total = [sum(step) for step in steps]
    low, median, high = statistics.quantiles(total, n=4)
    ratios = statistics.quantiles([a / b for a, b in zip(total, ours, strict=True)], n=4)
    forward, backward = (statistics.median(part) for part in zip(*steps, strict=True))
    return {
        "ms": round(1e3 * median, 3),
        "ms_quartiles": [round(1e3 * low, 3), round(1e3 * high, 3)],
        "forward_ms": round(1e3 * forward, 3),
        "backward_ms": round(1e3 * backward, 3),
        "x_sparse": round(ratios[1], 2),
        "x_sparse_quartiles": [round(ratios[0], 2), round(ratios[2], 2)],
    }


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _grown_bytes(way: str, batch: _Batch) -> int:
    """What one step adds to the peak memory of this process."""
    small = _Batch(2, 50, 3)  # loads the code
    for each in WAYS:
        small.step(small.loss(each))
    loss = batch.loss(way)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    batch.step(loss)
    return _peak_bytes() - before


def _measure_memory(way: str) -> int:
    """`_grown_bytes` of a fresh process, which gets this one's arguments."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MAPPED_BYTES)}
    command = [sys.executable, *sys.argv, "--memory-of", way]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return int(done.stdout)


@click.command()
@click.option("--batch-size", default=32, show_default=True, help="Images.")
@click.option("--classes", default=17_000, show_default=True)
@click.option("--labels", default=37, show_default=True, help="Labels of each image.")
@click.option("--rounds", default=200, show_default=True, help="Rounds that are counted.")
@click.option("--threads", default=1, show_default=True, help="Threads of PyTorch.")
@click.option("--memory-of", type=click.Choice(WAYS), hidden=True)
def main(
    batch_size: int, classes: int, labels: int, rounds: int, threads: int, memory_of: str | None
) -> None:
    """Time and peak memory of the multilabel loss, sparse and dense."""
    torch.set_num_threads(threads)
    batch = _Batch(batch_size, classes, labels)
    if memory_of:
        print(_grown_bytes(memory_of, batch))
        return
    tune_malloc()
    setup = {"batch_size": batch_size, "classes": classes, "labels": labels, "threads": threads}
    for way, row in _time(batch, rounds).items():
        grown = _measure_memory(way)
        matrices = round(grown / (4 * batch_size * classes), 2)
        memory = {"peak_mb": round(grown / 1e6, 2), "peak_matrices": matrices}
        print("RESULT", json.dumps({"way": way, **setup, "rounds": rounds, **row, **memory}))


if __name__ == "__main__":
    main()
