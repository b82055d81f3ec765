"""Limits of a user's processes: files, threads, locked memory."""

import resource
from pathlib import Path

from asynception.doctor import container
from asynception.doctor.finding import Verdict, fail, ok, warn

FILES_FOR_RAY = 8192
"""Ray's daemons hold a few descriptors for every worker process and node."""

FILES_PER_WORKER, FILES_BESIDES = 8, 256
"""Of a server: sockets and segments for each worker, and its libraries' own."""

THREADS_WITHOUT_RECIPE = 1024

LOCKED_FOR_RDMA = 64 << 20

UNLIMITED = resource.RLIM_INFINITY


def measure_open_files(num_workers: int) -> Verdict:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judge_open_files(soft, hard, FILES_PER_WORKER * num_workers + FILES_BESIDES)


def judge_open_files(soft: int, hard: int, needed: int) -> Verdict:
    """needed: of a server's process."""
    found = f"{_limit(soft)} files a process (at most {_limit(hard)})"
    mend = f"ulimit -n {max(65536, needed)} before Ray starts, or LimitNOFILE of its service"
    if soft != UNLIMITED and soft < needed:
        return fail(f"{found}; a server needs {needed}", mend)
    if soft != UNLIMITED and soft < FILES_FOR_RAY:
        return warn(f"{found}; Ray's daemons want {FILES_FOR_RAY} on a larger cluster", mend)
    return ok(found)


def measure_threads(needed: int) -> Verdict:
    """needed: processes and threads that will run here."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    return judge_threads(soft, container.process_limit(), needed)


def judge_threads(user_limit: int, container_limit: int | None, needed: int) -> Verdict:
    """Both limits count threads; what others of the same user run counts as well."""
    limits = [] if user_limit == UNLIMITED else [user_limit]
    limits += [] if container_limit is None else [container_limit]
    if not limits:
        return ok("no limit to processes and threads")
    least = min(limits)
    found = f"{least} processes and threads at most; about {needed} are needed"
    mend = f"ulimit -u {max(16384, 2 * needed)}, or the container's pids limit (--pids-limit)"
    if least < needed:
        return fail(found, mend)
    if least < 2 * needed:
        return warn(found, mend)
    return ok(found)


def measure_locked_memory() -> Verdict:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    devices = Path("/sys/class/infiniband")
    return judge_locked_memory(soft, devices.is_dir() and any(devices.iterdir()))


def judge_locked_memory(soft: int, has_rdma: bool) -> Verdict:
    """No lane locks memory; transports of Ray's or gloo's over InfiniBand would."""
    size = "any amount" if soft == UNLIMITED else f"{soft / 1e6:.1f} MB"
    found = f"{size} may be locked{'' if has_rdma else '; nothing here needs it'}"
    if has_rdma and soft != UNLIMITED and soft < LOCKED_FOR_RDMA:
        return warn(f"{found}, and there is InfiniBand", "ulimit -l unlimited before Ray starts")
    return ok(found)


def _limit(value: int) -> str:
    return "any number" if value == UNLIMITED else str(value)
