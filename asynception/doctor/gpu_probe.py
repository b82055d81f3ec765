"""Prints what GPUs do when torch lets them compute, as JSON.

A process of its own: drivers hang, and CUDA takes memory until its process ends.
"""

import json
from typing import Any

import torch


def probe() -> dict[str, Any]:
    """Name and memory of each GPU that has multiplied two matrices, and what went wrong, if so."""
    gpus: list[str] = []
    try:
        if torch.cuda.is_available():
            gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:  # CUDA's own, of many kinds
        return {"gpus": gpus, "error": str(error).strip().splitlines()[0]}
    return {"gpus": gpus, "error": None}


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    ones = torch.ones(256, 256, device=f"cuda:{index}")
    product = float((ones @ ones).sum())
    if product != 256.0**3:
        raise RuntimeError(f"GPU {index} computes {product} instead of {256.0**3}")
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"


if __name__ == "__main__":
    print(json.dumps(probe()))
