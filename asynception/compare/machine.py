"""What a run ran on, as far as it bears on its speed."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PACKAGES = ("asynception", "torch", "ray", "grpcio", "numpy")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and versions, but no name by which the machine could be found."""
    return {
        "processor": _processor(),
        "cores": _num_cores(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": dict(_versions()),
    }


def load_average() -> float:
    """Of the last minute: what else was going on."""
    return round(os.getloadavg()[0], 2)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _num_cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _versions() -> list[tuple[str, str]]:
    installed = {each.metadata["Name"].lower() for each in importlib.metadata.distributions()}
    return [(name, importlib.metadata.version(name)) for name in _PACKAGES if name in installed]


def describe_in_words(machine: Mapping[str, Any]) -> str:
    """A machine in one line."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory_gb']:g} GB of memory,"
        f" {machine['system']}, Python {machine['python']}, {packages}"
    )
