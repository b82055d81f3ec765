"""Time of a training step: forward, loss and backward of ours against Keras's and timm's models.

Ours is what a worker computes: uint8 images, a flattened module, gradients added into its flat
vector, the settings of `worker.compute`. Keras's is `keras.applications` on its torch backend in
training mode, with logits, torch's loss and a backward pass over the trainable variables, built
for both of its data formats; ratios are to the faster one. timm's takes part where it can be
imported. Parameters are not updated.

A round runs every step once, each round starting with another, and what is reported are medians
with the quartiles, and medians of the ratios within a round: absolute figures swing with the
machine's load. With Xception and Inception V3 among the models, the last row repeats the paper's
Table 3 in kind. Prints one line `RESULT {json}` for each row.

`--breakdown` says instead where the time of our step goes, by kind of layer, beside the machine's
limits in the same rounds: a large float32 matrix product, and a copy that no cache holds.
"""

import importlib
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from model.errors import InputError
from model.flat import FlatModule
from model.registry import create_model, model_names
from ps.malloc import tune_malloc
from worker.compute import ComputeSettings, ForwardPass

NUM_CLASSES = 1000
WARM_UP_ROUNDS = 2
"""Memory is touched, kernels are chosen and graphs compiled, for the first time."""

KERAS_NAMES = {"xception": "Xception", "inception_v3": "InceptionV3"}
TIMM_NAMES = {"xception": "legacy_xception", "inception_v3": "inception_v3"}
PAPER_STEPS_PER_S = {"xception": 28, "inception_v3": 31}
"""Table 3: 60 K80s, synchronous gradient descent, ImageNet."""

VARIANTS = {
    "nchw": ComputeSettings(channels_last=False),
    "bfloat16": ComputeSettings(precision="bfloat16"),
    "compile": ComputeSettings(compile=True),
    "bfloat16 compile": ComputeSettings(precision="bfloat16", compile=True),
}
OURS = "ours"

Step = Callable[[], None]


@dataclass(frozen=True)
class Work:
    """One batch, of uint8 images (N, 3, side, side) and labels (N,), on the device."""

    images: Tensor
    labels: Tensor

    @property
    def pixels(self) -> Tensor:
        """What the others are fed: float32 in [-1, 1]."""
        return self.images.float() / 127.5 - 1.0


def _work(batch_size: int, side: int, device: str) -> Work:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (batch_size, 3, side, side), dtype=torch.uint8, generator=generator
    )
    labels = torch.randint(0, NUM_CLASSES, (batch_size,), generator=generator)
    return Work(images.to(device), labels.to(device))


def _ours(name: str, work: Work, settings: ComputeSettings) -> Step:
    flat = FlatModule(create_model(name, NUM_CLASSES).to(work.images.device).train())
    forward = ForwardPass(flat, settings)

    def step() -> None:
        flat.zero_gradients()
        torch.autograd.backward(F.cross_entropy(forward(work.images), work.labels))

    step()
    flat.check_views()
    return step


def _keras(name: str, work: Work, data_format: str) -> Step:
    keras = importlib.import_module("keras")
    keras.config.set_image_data_format(data_format)
    pixels = work.pixels
    if data_format == "channels_last":
        pixels = pixels.permute(0, 2, 3, 1).contiguous()
    network = getattr(keras.applications, KERAS_NAMES[name])(
        weights=None,
        classes=NUM_CLASSES,
        input_shape=tuple(pixels.shape[1:]),
        classifier_activation=None,
    )
    parameters = [variable.value for variable in network.trainable_variables]

    def forward(images: Tensor) -> Tensor:
        logits: Tensor = network(images, training=True)
        return logits

    return _plain(forward, parameters, pixels, work.labels)


def _timm(name: str, work: Work) -> Step:
    """Raises InputError where timm is not installed."""
    network: nn.Module = create_model(f"timm:{TIMM_NAMES[name]}", NUM_CLASSES)
    network.to(work.images.device).train()
    return _plain(network, list(network.parameters()), work.pixels, work.labels)


def _plain(
    network: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    pixels: Tensor,
    labels: Tensor,
) -> Step:
    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(F.cross_entropy(network(pixels), labels))

    step()
    missed = sum(parameter.grad is None for parameter in parameters)
    assert not missed, f"{missed} parameters had no gradient"
    return step


def _contenders(name: str, work: Work, variants: Iterable[str]) -> Iterator[tuple[str, Step]]:
    yield OURS, _ours(name, work, ComputeSettings())
    for variant in variants:
        yield f"{OURS} {variant}", _ours(name, work, VARIANTS[variant])
    if name in KERAS_NAMES:
        for data_format in ("channels_last", "channels_first"):
            yield f"keras {data_format}", _keras(name, work, data_format)
    if name in TIMM_NAMES:
        try:
            yield "timm", _timm(name, work)
        except InputError as error:
            print(f"timm is left out: {error}")


def _seconds(step: Step) -> float:
    start_s = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def _interleaved(
    steps: Mapping[tuple[str, str], Step], num_rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every round, by model and contender."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    keys = list(steps)
    for number in range(WARM_UP_ROUNDS + num_rounds):
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            taken_s = _seconds(steps[key])
            if number >= WARM_UP_ROUNDS:
                seconds[key].append(taken_s)
    return seconds


def _ratio(values: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(v / b for v, b in zip(values, base, strict=True))


def _rows(seconds: Mapping[tuple[str, str], list[float]]) -> Iterator[dict[str, Any]]:
    for (name, contender), values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        yield {
            "model": name,
            "what": contender,
            "ms": round(1e3 * median, 1),
            "ms_quartiles": [round(1e3 * low, 1), round(1e3 * high, 1)],
            "steps_per_s": round(1 / median, 3),
            "x_ours": round(_ratio(values, seconds[name, OURS]), 2),
        }


def _summaries(seconds: Mapping[tuple[str, str], list[float]]) -> Iterator[dict[str, Any]]:
    """Ours against the faster of Keras's formats, and the two models against each other."""
    for name in dict.fromkeys(model for model, _ in seconds):
        theirs = {k[1]: v for k, v in seconds.items() if k[0] == name and k[1].startswith("keras")}
        if theirs:
            faster = min(theirs, key=lambda contender: statistics.median(theirs[contender]))
            ratio = _ratio(theirs[faster], seconds[name, OURS])
            yield {"model": name, "what": "speed of ours", "than": faster, "x": round(ratio, 2)}
    mine = {name: seconds[name, OURS] for name in PAPER_STEPS_PER_S if (name, OURS) in seconds}
    if len(mine) == len(PAPER_STEPS_PER_S):
        paper = PAPER_STEPS_PER_S["xception"] / PAPER_STEPS_PER_S["inception_v3"]
        yield {
            "what": "table 3 in kind",
            **{f"{n}_steps_per_s": round(1 / statistics.median(v), 3) for n, v in mine.items()},
            "xception_to_inception_v3": round(_ratio(mine["inception_v3"], mine["xception"]), 3),
            "paper": f"28 / 31 = {paper:.3f}",
        }


# Where the time goes

LAYERS = {
    "aten::native_batch_norm": "batch norm",
    "aten::native_batch_norm_backward": "batch norm",
    "aten::relu": "ReLU",
    "aten::relu_": "ReLU",
    "aten::threshold_backward": "ReLU",
    "aten::max_pool2d": "pool",
    "aten::max_pool2d_with_indices_backward": "pool",
    "aten::avg_pool2d": "pool",
    "aten::avg_pool2d_backward": "pool",
    "aten::add_": "additions",
}
"""Operations that contain none of each other."""

MEMORY_BOUND = ("depthwise", "batch norm", "ReLU")


def _kind(name: str, shapes: Sequence[Sequence[int]]) -> str | None:
    """Which kind of layer an operation belongs to, or None for what is not told apart."""
    if name not in ("aten::convolution", "aten::convolution_backward"):
        return LAYERS.get(name)
    weight = shapes[1 if name == "aten::convolution" else 2]
    if weight[1] == 1:
        return "depthwise"
    return "pointwise" if tuple(weight[2:]) == (1, 1) else "other convolutions"


def _way(name: str) -> str:
    if name == "aten::add_":  # of residuals, and of gradients to the flat vector
        return "both"
    return "backward" if name.endswith("_backward") else "forward"


class _Breakdown:
    """Seconds of each kind of layer, forward and backward, by round; and what it has to do."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.macs: dict[str, int] = {}
        """Multiply-accumulates of one forward pass. A backward pass has twice as many."""
        self.bytes: dict[tuple[str, str], int] = {}
        """Of maps, each read or written once: input and output; both, and the input's gradient."""

    def add(self, step: Step) -> None:
        """Profile one step."""
        activities = [ProfilerActivity.CPU]
        with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
            total_s = _seconds(step)
        spent: dict[tuple[str, str], float] = defaultdict(float)
        self.macs, self.bytes = defaultdict(int), defaultdict(int)
        for event in profiler.key_averages(group_by_input_shape=True):
            kind = _kind(event.key, event.input_shapes)
            if kind is not None:
                way = _way(event.key)
                spent[kind, way] += 1e-6 * event.cpu_time_total
            if kind is not None and event.key.endswith("_backward"):
                output, taken = (event.count * prod(shape) for shape in event.input_shapes[:2])
                self.bytes[kind, "forward"] += 4 * (output + taken)
                self.bytes[kind, "backward"] += 4 * (output + 2 * taken)
                if event.key == "aten::convolution_backward":
                    self.macs[kind] += output * prod(event.input_shapes[2][1:])
        spent["rest", "both"] = total_s - sum(spent.values())
        spent["step", "both"] = total_s
        for key, value in spent.items():
            self.seconds[key].append(value)

    def rows(self, peak_gflops: float) -> Iterator[dict[str, Any]]:
        """peak_gflops: of the large matrix product, 2 for each multiply-accumulate."""
        whole = statistics.median(self.seconds["step", "both"])
        for (kind, way), values in sorted(
            self.seconds.items(), key=lambda item: -statistics.median(item[1])
        ):
            median = statistics.median(values)
            row = {"layer": kind, "way": way, "ms": round(1e3 * median, 1)}
            row["share"] = round(median / whole, 3)
            macs = sum(self.macs.values()) if kind == "step" else self.macs.get(kind)
            if macs is not None:
                operations = 2 * macs * {"forward": 1, "backward": 2, "both": 3}[way]
                gflops = 1e-9 * operations / median
                row |= {"gflop_per_s": round(gflops, 1), "of_peak": round(gflops / peak_gflops, 2)}
            if kind in MEMORY_BOUND:
                row["gb_per_s"] = round(1e-9 * self.bytes[kind, way] / median, 1)
            yield row


def _break_down(step: Step, num_rounds: int) -> Iterator[dict[str, Any]]:
    step()
    breakdown, limits = _Breakdown(), _limits()
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(num_rounds):
        breakdown.add(step)
        for name, (amount, operation) in limits.items():
            rates[name].append(amount / min(_seconds(operation) for _ in range(2)))
    for name, values in rates.items():
        median, best = statistics.median(values), max(values)
        yield {"limit": name, "median": round(median, 1), "best": round(best, 1)}
    yield from breakdown.rows(statistics.median(rates["float32 matmul, GFLOP/s"]))


def _limits() -> dict[str, tuple[float, Step]]:
    """What the machine can do: (billions of operations or bytes, a call that does them)."""
    side, copied_bytes = 2048, 2**28
    limits = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"{str(dtype).removeprefix('torch.')} matmul, GFLOP/s"
        limits[name] = (2e-9 * side**3, _matmul(side, dtype))
    # Counted twice: a copy reads and writes.
    limits["memcpy, GB/s"] = (2e-9 * copied_bytes, _copy(copied_bytes))
    return limits


def _matmul(side: int, dtype: torch.dtype) -> Step:
    a, b = torch.randn(2, side, side).to(dtype)
    product = torch.empty_like(a)

    def step() -> None:
        torch.mm(a, b, out=product)

    return step


def _copy(num_bytes: int) -> Step:
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.zeros_like(source)

    def step() -> None:
        target.copy_(source)

    return step


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}"


@click.command()
@click.option("--model", "models", multiple=True, default=list(KERAS_NAMES), show_default=True)
@click.option("--size", "sizes", multiple=True, default=[128, 299], type=int, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Rounds that are counted.")
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--breakdown", is_flag=True, help="By kind of layer, on the CPU.")
def main(
    models: tuple[str, ...],
    sizes: tuple[int, ...],
    batch_size: int,
    rounds: int,
    threads: int,
    variants: tuple[str, ...],
    device: str,
    breakdown: bool,
) -> None:
    """Time training steps of ours against Keras's and timm's."""
    os.environ |= {"KERAS_BACKEND": "torch", "KERAS_TORCH_DEVICE": device}
    torch.set_num_threads(threads)
    tune_malloc()
    for name in set(models) - set(model_names()):
        print(f"{name} is left out: the registry has {', '.join(model_names())}")
    models = tuple(name for name in models if name in model_names())
    device = "cpu" if breakdown else device
    for size in sizes:
        setup: dict[str, Any] = {"size": size, "batch_size": batch_size, "rounds": rounds}
        setup |= {"threads": threads, "device": _device_name(device)}
        work = _work(batch_size, size, device)
        if breakdown:
            for name in models:
                for row in _break_down(_ours(name, work, ComputeSettings()), rounds):
                    print("RESULT", json.dumps({"model": name, **row, **setup}), flush=True)
            continue
        steps = {
            (name, contender): step
            for name in models
            for contender, step in _contenders(name, work, variants)
        }
        seconds = _interleaved(steps, rounds)
        for row in (*_rows(seconds), *_summaries(seconds)):
            print("RESULT", json.dumps({**row, **setup}), flush=True)


if __name__ == "__main__":
    main()
