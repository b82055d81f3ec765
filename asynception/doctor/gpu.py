"""GPUs: there, usable by this torch, and given to Ray."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asynception.doctor import gpu_probe
from asynception.doctor.apart import measure_apart
from asynception.doctor.finding import Verdict, fail, ok, warn

LIMIT_S = 60.0
"""CUDA's start alone takes seconds, on a machine of eight GPUs many."""


@dataclass(frozen=True)
class Gpus:
    """What torch sees of them."""

    built_for: str | None
    """CUDA's version that torch was built for; None for a build without."""
    driver: str | None
    device_nodes: int
    """GPUs that the system shows in /dev, whether torch can use them or not."""
    gpus: Sequence[str]
    """Name and memory of each that has computed."""
    error: str | None


def measure_gpu(wanted: int, ray_gpus: float | None) -> Verdict:
    """wanted: GPUs that must be here. ray_gpus: those that this node gave to Ray, if it is one."""
    built_for = torch.version.cuda or torch.version.hip
    seen: Any = {"gpus": [], "error": None}
    if built_for is not None:
        env = _unhidden(os.environ, ray_gpus is not None)
        seen = measure_apart(Path(gpu_probe.__file__), LIMIT_S, env)
    nodes = len(list(Path("/dev").glob("nvidia[0-9]*")))
    gpus = Gpus(built_for, _driver(), nodes, seen["gpus"], seen["error"])
    return judge_gpu(gpus, wanted, ray_gpus)


def _driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def _unhidden(env: Mapping[str, str], by_ray: bool) -> dict[str, str]:
    """Ray hides all GPUs from a task that reserves none."""
    hidden = by_ray and not env.get("CUDA_VISIBLE_DEVICES")
    return {k: v for k, v in env.items() if not (hidden and k == "CUDA_VISIBLE_DEVICES")}


def judge_gpu(seen: Gpus, wanted: int, ray_gpus: float | None) -> Verdict:
    """None is fine where none is wanted."""
    found = _in_words(seen)
    if seen.error is not None:
        return fail(f"{found}: {seen.error}", "install a torch that was built for this GPU")
    if seen.device_nodes > len(seen.gpus):
        built = seen.built_for or "CPUs alone"
        mend = (
            f"torch is built for {built}: install the build for this driver, and check nvidia-smi"
        )
        return (fail if wanted else warn)(f"{found}; /dev shows {seen.device_nodes}", mend)
    if len(seen.gpus) < wanted:
        return fail(
            f"{found}, and scaling.use_gpu = true needs {wanted} here",
            "set scaling.use_gpu = false, lower scaling.num_workers, or use a machine with GPUs",
        )
    if ray_gpus is not None and ray_gpus < len(seen.gpus):
        return warn(
            f"{found}, of which Ray has {ray_gpus:g}",
            f"start Ray on this node with --num-gpus {len(seen.gpus)}",
        )
    return ok(found)


def _in_words(seen: Gpus) -> str:
    if not seen.gpus:
        return "no GPU; torch computes on the CPU"
    names = ", ".join(f"{times} x {name}" for name, times in Counter(seen.gpus).items())
    return f"{names}; CUDA {seen.built_for}, driver {seen.driver or 'unknown'}"
