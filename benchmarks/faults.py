"""What real faults cost, counted: on three hosts made from network namespaces, one raylet each.

Trains with a server of two shards on the first host and a worker on each of the others, injects a
fault so many times, lets the run end, and counts from the parameters how often each image's work
was applied (see tally.py). Prints one line `RESULT {json}` for each fault: times injected, updates
acknowledged, lost and doubled (in images, at a shard), the longest pause between two steps of the
run, and the seconds until all workers were at work again. With --replicas 1 servers may be on any
host, each with a standby on another, and a host that dies takes what it has of both. Needs root;
everything is removed in the end, also after Ctrl-C.
"""

import json
import os
import signal
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import click
from counted_run import BOTH, SERVERS, WORKER, CountedRun, counted_run, pause_of

from asynception.hosts.namespaces import lacking
from asynception.hosts.ray_nodes import ray_nodes

EPOCHS = 8
"""Of each injection: more than it takes, since what is left in the end goes fast."""
LOSS, SLOW_MBIT, QUEUE_MS = 0.05, 2.0, 200.0
SHAPED_STEPS = 40

Times = tuple[float, float]
"""The longest pause between two steps, and the seconds until all workers were at work again."""


def _replaced(run: CountedRun, deaths: int) -> Callable[[], bool]:
    return lambda: run.num_events("died after") > deaths and run.is_whole()


def kill_worker(run: CountedRun, host: int) -> Times:
    """SIGKILL a worker."""
    deaths = run.num_events("died after")
    os.kill(run.worker_pid(host), signal.SIGKILL)
    return pause_of(run, _replaced(run, deaths))


def kill_evaluator(run: CountedRun, host: int) -> Times:
    """SIGKILL the evaluator: the next evaluation is by another."""
    evaluations = len(run.lines("eval"))
    os.kill(run.evaluator_pid(), signal.SIGKILL)
    return pause_of(run, lambda: len(run.lines("eval")) > evaluations)


def kill_host(run: CountedRun, host: int) -> Times:
    """SIGKILL everything on a worker's host; once the others go on without it, it comes back."""
    waits, returns = (run.num_events(text) for text in ("go on without it", "is back"))
    run.nodes.kill(host)
    pause_s, noticed_s = pause_of(run, lambda: run.num_events("go on without it") > waits)
    run.wait_for_steps(10)
    run.nodes.restart(host)
    again = pause_of(run, lambda: run.num_events("is back") > returns and run.is_whole())
    return max(pause_s, again[0]), noticed_s + again[1]


def cut_off(run: CountedRun, host: int) -> Times:
    """Cut a worker's host off until its worker is given up and the others go on; let it return."""
    waits, returns = (run.num_events(text) for text in ("go on without it", "is back"))
    run.nodes.hosts[host].cut()
    pause_s, given_up_s = pause_of(run, lambda: run.num_events("go on without it") > waits)
    run.wait_for_steps(10)
    run.nodes.hosts[host].mend()
    again = pause_of(run, lambda: run.num_events("is back") > returns and run.is_whole())
    return max(pause_s, again[0]), given_up_s + again[1]


def stop_worker(run: CountedRun, host: int) -> Times:
    """SIGSTOP a worker until it is given up for its silence, then SIGCONT."""
    deaths, pid = run.num_events("died after"), run.worker_pid(host)
    os.kill(pid, signal.SIGSTOP)
    pause_s, given_up_s = pause_of(run, lambda: run.num_events("died after") > deaths)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    again = pause_of(run, run.is_whole)
    return max(pause_s, again[0]), given_up_s + again[1]


def kill_server(run: CountedRun, host: int) -> Times:
    """SIGKILL a server or a standby: whole when there is a standby again."""
    return _losing(run, lambda: os.kill(run.server_pid(host), signal.SIGKILL))


def stop_server(run: CountedRun, host: int) -> Times:
    """SIGSTOP a server or a standby until it is given up for its silence."""
    return _losing(run, lambda: os.kill(run.server_pid(host), signal.SIGSTOP))


def _losing(run: CountedRun, lose: Callable[[], None]) -> Times:
    seeded = run.num_events("has a standby again")
    lose()
    return pause_of(run, lambda: run.num_events("has a standby again") > seeded)


def lose_packets(run: CountedRun, host: int) -> Times:
    """A worker's link loses one packet in twenty each way."""
    return _shaped(run, host, lambda: run.nodes.hosts[host].lose(LOSS))


def slow_link(run: CountedRun, host: int) -> Times:
    """A worker's link lets 2 Mbit/s pass, behind a queue of up to 200 ms."""
    return _shaped(run, host, lambda: run.nodes.hosts[host].slow(SLOW_MBIT, QUEUE_MS))


def _shaped(run: CountedRun, host: int, shape: Callable[[], None]) -> Times:
    shape()
    goal = run.samples() + 8 * SHAPED_STEPS
    pause_s, _ = pause_of(run, lambda: run.samples() >= goal)
    run.nodes.hosts[host].mend()
    return pause_s, 0.0


FAULTS: dict[str, Callable[[CountedRun, int], Times]] = {
    "kill worker": kill_worker,
    "kill evaluator": kill_evaluator,
    "kill host": kill_host,
    "cut host off": cut_off,
    "stop worker": stop_worker,
    "lose packets": lose_packets,
    "slow link": slow_link,
}
FAULTS_WITH_STANDBYS: dict[str, Callable[[CountedRun, int], Times]] = {
    "kill server": kill_server,
    "stop server": stop_server,
}


def inject(run: CountedRun, faults: Sequence[str], rounds: int) -> list[Times]:
    """All faults in turn, so many times, on one worker's host and then on the other."""
    times = []
    for number in range(rounds):
        for name in faults:
            run.wait_for_steps(5)
            fault = {**FAULTS, **FAULTS_WITH_STANDBYS}[name]
            times.append(fault(run, 1 + number % 2))
            print(
                f"{name}: pause {times[-1][0]:.1f} s, whole after {times[-1][1]:.1f} s", flush=True
            )
    return times


def row(faults: Sequence[str], rounds: int, run: CountedRun) -> dict[str, object]:
    """What one run shows."""
    times = inject(run, faults, rounds)
    counts = run.finish()
    pauses_s, whole_s = zip(*times, strict=True)
    return {
        "faults": ", ".join(faults),
        "injected": len(times),
        **vars(counts),
        "longest_pause_s": round(max(pauses_s), 1),
        "whole_after_s": round(statistics.median(whole_s), 1),
    }


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True, help="Injections of each fault.")
@click.option(
    "--fault", "chosen", multiple=True, type=click.Choice([*FAULTS, *FAULTS_WITH_STANDBYS])
)
@click.option("--together", is_flag=True, help="All faults in one run, in one row.")
@click.option("--mode", default="async", type=click.Choice(["async", "bounded", "sync"]))
@click.option("--replicas", default=0, type=click.IntRange(0, 1), help="Standbys of each server.")
@click.option("--keep", type=click.Path(path_type=Path), help="Where to leave the runs' folders.")
def main(
    rounds: int,
    chosen: Sequence[str],
    together: bool,
    mode: str,
    replicas: int,
    keep: Path | None,
) -> None:
    reason = lacking()
    if reason:
        raise click.ClickException(f"{reason}: nothing was injected")
    if not replicas and {*chosen} & {*FAULTS_WITH_STANDBYS}:
        raise click.ClickException("a lost server costs updates without --replicas 1")
    names = list(chosen) or [*FAULTS, *(FAULTS_WITH_STANDBYS if replicas else ())]
    hosts = [SERVERS, BOTH, BOTH] if replicas else [SERVERS, WORKER, WORKER]
    groups = [names] if together else [[name] for name in names]
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_nodes(hosts) as nodes,
    ):
        for number, faults in enumerate(groups):
            epochs = EPOCHS * rounds * len(faults)
            settings = {"consistency.mode": mode, "scaling.replicas": replicas}
            with counted_run(nodes, (keep or Path(folder)) / str(number), epochs, settings) as run:
                told = {"mode": mode, "replicas": replicas, **row(faults, rounds, run)}
                print("RESULT", json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
