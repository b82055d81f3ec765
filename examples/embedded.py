"""Training as one step of a Ray program: two learning rates, then something with the best.

python examples/embedded.py examples/stripes.toml
"""

import sys
from pathlib import Path

import ray

from asynception import Result, Trainer
from asynception.recipe import load_config

RATES = (0.002, 0.02)


@ray.remote
def count_values(checkpoint: str) -> int:
    """A stand-in for what a program does with a model: any task or actor, on any node."""
    from safetensors import safe_open

    with safe_open(Path(checkpoint) / "ema.safetensors", "pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118


def train(recipe: Path, rate: float) -> Result:
    """One run on the Ray that is there; its resources are free again when this returns."""
    overrides = ["--schedule.lr", str(rate), "--run.name", f"rate-{rate}"]
    return Trainer(load_config(recipe, overrides)).fit()


def main(recipe: Path) -> None:
    ray.init()
    results = {rate: train(recipe, rate) for rate in RATES}
    for rate, result in results.items():
        print(f"learning rate {rate}: top-1 {result.metrics['top1']:.3f} in {result.path}")
    best = max(results.values(), key=lambda result: result.metrics["top1"])
    assert best.checkpoint is not None
    num_values = ray.get(count_values.remote(best.checkpoint))
    print(f"the best is {best.path}, whose average has {num_values} values")
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
