"""Cores: how many there are, may be used, and are free."""

import os

from asynception.doctor import container
from asynception.doctor.finding import Verdict, fail, ok, warn


def measure_cores(wanted: float) -> Verdict:
    """wanted: CPUs that a run reserves here; 0 if unknown."""
    return judge_cores(os.cpu_count() or 1, _num_allowed(), container.processor_limit(), wanted)


def _num_allowed() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> float:
    """What affinity and the container leave."""
    return min(float(_num_allowed()), container.processor_limit() or float("inf"))


def judge_cores(present: int, allowed: int, quota: float | None, wanted: float) -> Verdict:
    """Ray counts the cores that are present, whatever may be used of them."""
    usable = min(float(allowed), quota or float("inf"))
    found = f"{present} cores, {usable:g} usable"
    if wanted > present:
        return fail(
            f"{found}; the recipe reserves {wanted:g}",
            "lower scaling.num_workers, or set scaling.resources_per_worker.CPU below 1",
        )
    if usable < present or wanted > usable:
        return warn(
            f"{found}; workers may be given more than there are",
            "raise the container's CPU limit, or start Ray with --num-cpus of what is usable",
        )
    return ok(found)


def measure_load() -> Verdict:
    return judge_load(os.getloadavg()[0], usable_cores())


def judge_load(load: float, usable: float) -> Verdict:
    """load: average number of running processes over the last minute."""
    found = f"{load:.1f} running processes in the last minute, for {usable:g} cores"
    if load > usable:
        return warn(found, "end what else runs here: workers would be slow and uneven")
    return ok(found)
