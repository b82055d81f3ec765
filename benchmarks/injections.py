"""The faults that `faults.py` injects into a run, and when each is got over."""

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counted_run import (
    BATCH_SIZE,
    BOTH,
    NOBODY,
    SERVERS,
    SHORT_TIMEOUTS,
    WORKER,
    CountedRun,
    Since,
)
from server_roles import TITLE, Pair

from asynception.hosts.network import Host
from asynception.hosts.ray_nodes import NodeOptions

LOSS, SLOW_MBIT, QUEUE_MS, DELAY_S = 0.05, 2.0, 200.0, 0.1
SHAPED_STEPS = 40
LONG_PAUSE_S = 30.0

DIED, WAITS, RETURNS = "died after", "go on without it", "is back"
PROMOTED, SEEDED = "its standby goes on", "has a standby again"
AGAIN, WRITTEN = "starting again from", "checkpoint checkpoint-"
FAILED = "checkpoint failed, the earlier ones are whole"
STALE = "this server was replaced, and answers nothing any more"
"""What a run says, or a server of it."""

Times = tuple[float, float]
"""The longest pause between two steps, and the seconds until all workers were at work again."""


def kill_worker(run: CountedRun, host: int) -> Times:
    """SIGKILL a worker."""
    deaths, since = run.num_events(DIED), Since(run)
    os.kill(run.worker_pid(host), signal.SIGKILL)
    since.until(lambda: run.num_events(DIED) > deaths and run.is_whole())
    return since.times


def kill_evaluator(run: CountedRun, host: int) -> Times:
    """SIGKILL the evaluator: the next evaluation is by another."""
    evaluations, since = len(run.lines("eval")), Since(run)
    os.kill(run.pid("ray::EvaluatorProcess"), signal.SIGKILL)
    since.until(lambda: len(run.lines("eval")) > evaluations)
    return since.times


def kill_coordinator(run: CountedRun, host: int) -> Times:
    """SIGKILL the coordinator: whole when another says that the run has got further."""
    deaths, since = run.num_events("the coordinator died"), Since(run)
    os.kill(run.pid("ray::JournaledCoordinator"), signal.SIGKILL)
    since.until(lambda: run.num_events("the coordinator died") > deaths)
    since.until(_further(run, 1))
    return since.times


def kill_host(run: CountedRun, host: int) -> Times:
    """SIGKILL everything on a worker's host; once the others go on without it, it comes back."""
    waits, returns, since = run.num_events(WAITS), run.num_events(RETURNS), Since(run)
    run.nodes.kill(host)
    since.until(lambda: run.num_events(WAITS) > waits)
    since.until(_further(run, 10, workers=1))
    since.restart(host)
    since.until(lambda: run.num_events(RETURNS) > returns and run.is_whole())
    return since.times


def cut_off(run: CountedRun, host: int) -> Times:
    """Cut a worker's host off until its worker is given up and the others go on; let it return."""
    waits, returns, since = run.num_events(WAITS), run.num_events(RETURNS), Since(run)
    run.nodes.hosts[host].cut()
    since.until(lambda: run.num_events(WAITS) > waits)
    since.until(_further(run, 10, workers=1))
    since.mend(host, lambda: run.num_events(RETURNS) > returns and run.is_whole())
    return since.times


def stop_worker(run: CountedRun, host: int) -> Times:
    """SIGSTOP a worker until it is given up for its silence, then SIGCONT."""
    deaths, pid, since = run.num_events(DIED), run.worker_pid(host), Since(run)
    os.kill(pid, signal.SIGSTOP)
    since.until(lambda: run.num_events(DIED) > deaths)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    since.until(run.is_whole)
    return since.times


def pause_worker(run: CountedRun, host: int) -> Times:
    """SIGSTOP a worker for 30 s, which is no reason to give it up."""
    return _paused(run, run.worker_pid(host))


def pause_primary(run: CountedRun, host: int) -> Times:
    """SIGSTOP a primary for 30 s, which is no reason to give it up."""
    return _paused(run, _pair(run, host).primary.pid)


def _paused(run: CountedRun, pid: int) -> Times:
    until_s, since = time.monotonic() + LONG_PAUSE_S, Since(run)
    os.kill(pid, signal.SIGSTOP)
    since.until(lambda: time.monotonic() >= until_s)
    os.kill(pid, signal.SIGCONT)
    since.until(_further(run, 10))
    return since.times


def _further(run: CountedRun, num_steps: int, workers: int | None = None) -> Callable[[], bool]:
    """So many steps from now, by all workers or so many."""
    goal = run.samples() + num_steps * BATCH_SIZE
    return lambda: run.samples() >= goal and (workers is not None or run.is_whole())


def kill_primary(run: CountedRun, host: int) -> Times:
    """SIGKILL a primary: whole when its standby, in its place, has a standby again."""
    return _promoting(run, host, signal.SIGKILL)


def stop_primary(run: CountedRun, host: int) -> Times:
    """SIGSTOP a primary until it is given up for its silence."""
    return _promoting(run, host, signal.SIGSTOP)


def kill_standby(run: CountedRun, host: int) -> Times:
    """SIGKILL a standby: whole when there is one again."""
    return _losing_standby(run, host, signal.SIGKILL)


def stop_standby(run: CountedRun, host: int) -> Times:
    """SIGSTOP a standby until it is given up for its silence."""
    return _losing_standby(run, host, signal.SIGSTOP)


def _pair(run: CountedRun, number: int) -> Pair:
    """One of them: all have a turn."""
    found = run.server_pairs()
    return found[number % len(found)]


def _promoting(run: CountedRun, host: int, number: signal.Signals) -> Times:
    promoted, seeded = run.num_events(PROMOTED), run.num_events(SEEDED)
    primary, since = _pair(run, host).primary, Since(run)
    os.kill(primary.pid, number)
    since.until(lambda: run.num_events(PROMOTED) > promoted and run.num_events(SEEDED) > seeded)
    return since.times


def _losing_standby(run: CountedRun, host: int, number: signal.Signals) -> Times:
    promoted, seeded = run.num_events(PROMOTED), run.num_events(SEEDED)
    standby, since = _pair(run, host).standby, Since(run)
    os.kill(standby.pid, number)
    since.until(lambda: run.num_events(SEEDED) > seeded)
    assert run.num_events(PROMOTED) == promoted, "it was no standby"
    return since.times


def cut_primary_off(run: CountedRun, host: int) -> Times:
    """Cut a primary's host off, with all that is there, until it is given up; let it return.

    Whole when that primary has ended or has said that it answers nothing any more.
    """
    while not (away := [each.primary for each in run.server_pairs() if each.primary.host]):
        kill_primary(run, host)  # without the first host there is no cluster
    stale, nodes = away[host % len(away)], run.nodes
    known = nodes.said(stale.host).count(STALE)
    promoted, seeded, since = run.num_events(PROMOTED), run.num_events(SEEDED), Since(run)
    nodes.hosts[stale.host].cut()
    since.until(lambda: run.num_events(PROMOTED) > promoted)
    since.until(_further(run, 10, workers=1))
    refused: list[str] = []

    def is_over() -> bool:
        refused[:] = re.findall(f"{STALE}: (.*)", nodes.said(stale.host))[known:]
        return bool(refused) or stale.pid not in nodes.pids(stale.host, TITLE)

    since.mend(stale.host, is_over)
    print(f"the stale primary: {'; '.join(refused) or 'ended before it was told'}", flush=True)
    since.mend(stale.host, lambda: run.num_events(SEEDED) > seeded and run.is_whole())
    return since.times


def lose_server(run: CountedRun, host: int) -> Times:
    """SIGKILL a server that has no standby: its newest updates are lost, and counted."""
    begun, since = run.num_events(AGAIN), Since(run)
    os.kill(run.pid(TITLE), signal.SIGKILL)
    since.until(lambda: run.num_events(AGAIN) > begun)
    since.until(_further(run, 10))
    return since.times


def lose_servers_host(run: CountedRun, host: int) -> Times:
    """SIGKILL everything on a host with a server that has no standby; the host comes back."""
    chosen = next(each for each in (host, 3 - host) if run.nodes.pids(each, TITLE))
    begun, since = run.num_events(AGAIN), Since(run)
    run.nodes.kill(chosen)
    since.until(lambda: run.num_events(AGAIN) > begun)
    since.restart(chosen)
    since.until(_further(run, 10))
    return since.times


def switch_servers_host_off(run: CountedRun, host: int) -> Times:
    """The same without a word to anyone: its link is cut first, and mended when it comes back."""
    chosen = next(each for each in (host, 3 - host) if run.nodes.pids(each, TITLE))
    begun, since = run.num_events(AGAIN), Since(run)
    run.nodes.hosts[chosen].cut()
    run.nodes.kill(chosen)
    since.until(lambda: run.num_events(AGAIN) > begun)
    since.until(_further(run, 10, workers=1))
    run.nodes.hosts[chosen].mend()
    since.restart(chosen)
    since.until(_further(run, 10))
    return since.times


def lose_packets(run: CountedRun, host: int) -> Times:
    """A worker's link loses one packet in twenty each way."""
    return _shaped(run, host, lambda link: link.lose(LOSS))


def slow_link(run: CountedRun, host: int) -> Times:
    """A worker's link lets 2 Mbit/s pass, behind a queue of up to 200 ms."""
    return _shaped(run, host, lambda link: link.slow(SLOW_MBIT, QUEUE_MS))


def _shaped(run: CountedRun, host: int, shape: Callable[[Host], None]) -> Times:
    since, link = Since(run), run.nodes.hosts[host]
    shape(link)
    since.until(_further(run, SHAPED_STEPS))
    link.mend()
    return since.times[0], 0.0


def delay_link(run: CountedRun, host: int) -> Times:
    """A worker's link takes 100 ms more each way."""
    since = Since(run)
    with run.nodes.hosts[host].delayed(DELAY_S):
        since.until(_further(run, SHAPED_STEPS))
    since.until(_further(run, 5))
    return since.times[0], 0.0


def fill_disk(run: CountedRun, host: int) -> Times:
    """Fill the file system of the checkpoints until one has failed, and then make room again.

    Earlier ones are read, with their checksums, meanwhile. Whole when the next one is written.
    """
    run.wait(run.num_checkpoints, "checkpoint")
    failed, since = run.said_times(FAILED), Since(run)
    ballast = _filled(run.checkpoint_folder)
    since.until(lambda: run.said_times(FAILED) > failed)
    run.check_checkpoints()
    steps = run.shown()
    since.until(lambda: run.shown() > steps + 10 * BATCH_SIZE)
    ballast.unlink()
    written = run.num_events(WRITTEN)
    since.until(lambda: run.num_events(WRITTEN) > written)
    return since.times


def _filled(folder: Path) -> Path:
    """A file that leaves no room on a small file system."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast


@dataclass(frozen=True)
class Setup:
    """What a run is like that a fault is for."""

    hosts: tuple[NodeOptions, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    small_disk: tuple[str, ...] = ()
    """Settings whose value is a file system of a few MB."""


_LONE = Setup((SERVERS, WORKER, WORKER), SHORT_TIMEOUTS)
_LOST = Setup((NOBODY, BOTH, BOTH), {**SHORT_TIMEOUTS, "failure.max_failures": -1})
_PATIENT = Setup((SERVERS, WORKER, WORKER))
_PATIENT_LOST = Setup(_LOST.hosts, {"failure.max_failures": -1})
_PAIRED = Setup((SERVERS, BOTH, BOTH), SHORT_TIMEOUTS)
_PATIENT_PAIRED = Setup((SERVERS, BOTH, BOTH))


def _on_small_disk(setting: str) -> Setup:
    often = {**SHORT_TIMEOUTS, "checkpoint.every_s": 2.0}
    return Setup(_LONE.hosts, often, small_disk=(setting,))


Inject = Callable[[CountedRun, int], Times]

ANYWHERE: Mapping[str, Inject] = {
    "kill worker": kill_worker,
    "kill evaluator": kill_evaluator,
    "kill coordinator": kill_coordinator,
    "kill host": kill_host,
    "cut host off": cut_off,
    "stop worker": stop_worker,
    "lose packets": lose_packets,
    "slow link": slow_link,
    "delay link": delay_link,
}
"""With and without standbys."""

FAULTS: Mapping[int, Mapping[str, tuple[Inject, Setup]]] = {
    0: {
        **{name: (inject, _LONE) for name, inject in ANYWHERE.items()},
        "pause worker": (pause_worker, _PATIENT),
        "lose server": (lose_server, _LOST),
        "lose server's host": (lose_servers_host, _LOST),
        "switch server's host off": (switch_servers_host_off, _PATIENT_LOST),
        "fill checkpoints' disk": (fill_disk, _on_small_disk("checkpoint.path")),
        "fill run's disk": (fill_disk, _on_small_disk("run.storage_path")),
    },
    1: {
        **{name: (inject, _PAIRED) for name, inject in ANYWHERE.items()},
        "kill primary": (kill_primary, _PAIRED),
        "kill standby": (kill_standby, _PAIRED),
        "stop primary": (stop_primary, _PAIRED),
        "stop standby": (stop_standby, _PAIRED),
        "cut primary off": (cut_primary_off, _PAIRED),
        "pause primary": (pause_primary, _PATIENT_PAIRED),
    },
}
"""By the number of standbys of each server."""
