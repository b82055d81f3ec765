"""What the container allows of memory, processor and processes: limits of control groups."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")

_NO_LIMIT = 1 << 60
"""Version 1 says the largest whole page below 2^63 for no limit at all."""


def memory_limit(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Bytes that this container may use at most; None without a limit."""
    return _least(root, own, "memory", "memory.max", "memory.limit_in_bytes")


def memory_used(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Bytes in use in the group that the process is in, page cache included."""
    for folder, version in _folders(root, own, "memory"):
        name = "memory.current" if version == 2 else "memory.usage_in_bytes"
        value = _number(folder / name)
        if value is not None:
            return value
    return None


def process_limit(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Processes and threads at most; None without a limit."""
    return _least(root, own, "pids", "pids.max", "pids.max")


def processor_limit(root: Path = ROOT, own: Path = OWN) -> float | None:
    """Cores' worth of time at most; None without a limit."""
    least: float | None = None
    for folder, version in _folders(root, own, "cpu"):
        quota = _quota(folder, version)
        if quota is not None:
            least = quota if least is None else min(least, quota)
    return least


def _quota(folder: Path, version: int) -> float | None:
    if version == 2:
        words = _text(folder / "cpu.max").split()
        return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _least(root: Path, own: Path, controller: str, name: str, name_in_1: str) -> int | None:
    limits = [
        _number(folder / (name if version == 2 else name_in_1))
        for folder, version in _folders(root, own, controller)
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def _folders(root: Path, own: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The process's groups and those above them, innermost first, and the groups' version.

    Within a container, paths of /proc may start outside of what is mounted; the mount's own top is
    then the container's.
    """
    for line in _text(own).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            top, version = root, 2
        elif controller in controllers.split(","):
            top, version = root / controller, 1
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for length in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:length]), version


def _number(path: Path) -> int | None:
    """None for no file, or no limit."""
    text = _text(path).strip()
    value = int(text) if text.lstrip("-").isdigit() else None
    return value if value is not None and value < _NO_LIMIT else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
