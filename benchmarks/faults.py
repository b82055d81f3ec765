"""What real faults cost, counted: on three hosts made from network namespaces, one raylet each.

Trains with two servers on the first host and a worker on each of the others, injects a fault so
many times, lets the run end, and counts from the parameters how often each image's work was applied
(see tally.py). Prints one line `RESULT {json}` for each run, which has one fault or, with
--together, all that it can have: updates acknowledged, lost and doubled (in images, at a shard),
and for each fault the times injected, the longest pause between two steps, and the seconds until
all was as before. With --replicas 1 servers may be on any
host, each with a standby on another, and a host that dies takes what it has of both. After each
fault, and after each run, nothing may be there that isn't needed: no process, socket, namespace,
mount or shared memory. Needs root; everything is removed in the end, also after Ctrl-C.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count, groupby
from pathlib import Path
from typing import Any

import click
from counted_run import CountedRun, counted_run
from injections import FAULTS, Setup, Times
from leftovers import Before

from asynception.hosts import namespaces
from asynception.hosts.ray_nodes import ray_nodes

EPOCHS = 8
"""Of each injection: more than it takes, since what is left in the end goes fast."""

SMALL_DISK_MB = 16


def inject(
    run: CountedRun, replicas: int, faults: Sequence[str], rounds: int
) -> Mapping[str, list[Times]]:
    """All faults in turn, so many times, on one worker's host and then on the other."""
    times: dict[str, list[Times]] = {name: [] for name in faults}
    for number in range(rounds):
        for name in faults:
            run.wait_for_steps(5)
            fault, _ = FAULTS[replicas][name]
            pause_s, whole_s = fault(run, 1 + number % 2)
            run.check_nothing_is_left_over()
            print(f"{name}: pause {pause_s:.1f} s, whole after {whole_s:.1f} s", flush=True)
            times[name].append((pause_s, whole_s))
    return times


def row(replicas: int, faults: Sequence[str], rounds: int, run: CountedRun) -> dict[str, object]:
    """What one run shows."""
    times = inject(run, replicas, faults, rounds)
    counts = run.finish()
    run.check_nothing_is_left()
    return {
        "injected": rounds * len(faults),
        **vars(counts),
        "faults": {name: in_short(each) for name, each in times.items()},
    }


def in_short(times: Sequence[Times]) -> dict[str, float]:
    """Of all times that a fault was injected."""
    pauses_s, whole_s = zip(*times, strict=True)
    return {
        "injected": len(times),
        "longest_pause_s": round(max(pauses_s), 1),
        "whole_after_s": round(statistics.median(whole_s), 1),
    }


def groups(replicas: int, names: Sequence[str], together: bool) -> list[tuple[Setup, list[str]]]:
    """What is injected into one run: each fault, or all that need the same kind of run."""
    setups: list[tuple[Setup, list[str]]] = []
    for name in names:
        _, setup = FAULTS[replicas][name]
        known = next((group for group in setups if together and group[0] == setup), None)
        if known is None:
            setups.append((setup, [name]))
        else:
            known[1].append(name)
    return sorted(setups, key=lambda group: repr((group[0].hosts, group[0].small_disk)))


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system that is soon full."""
    folder.mkdir(exist_ok=True)
    size = ("-o", f"size={SMALL_DISK_MB}m")
    namespaces.run("mount", "-t", "tmpfs", *size, "asynception-faults", str(folder))
    try:
        yield folder
    finally:
        namespaces.run("umount", str(folder))


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True, help="Injections of each fault.")
@click.option(
    "--fault", "chosen", multiple=True, type=click.Choice(list({**FAULTS[0], **FAULTS[1]}))
)
@click.option("--together", is_flag=True, help="Faults in one run, in one row, where they can be.")
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
    reason = namespaces.lacking()
    if reason:
        raise click.ClickException(f"{reason}: nothing was injected")
    for name in chosen:
        if name not in FAULTS[replicas]:
            raise click.ClickException(f'"{name}" is for runs with --replicas {1 - replicas}')
    planned = groups(replicas, list(chosen) or list(FAULTS[replicas]), together)
    with tempfile.TemporaryDirectory() as temporary:
        folders = ((keep or Path(temporary)) / str(number) for number in count())
        for _, alike in groupby(planned, key=lambda group: (group[0].hosts, group[0].small_disk)):
            shared = {"consistency.mode": mode, "scaling.replicas": replicas}
            inject_into_cluster(list(alike), rounds, shared, Path(temporary) / "disk", folders)


def inject_into_cluster(
    planned: Sequence[tuple[Setup, list[str]]],
    rounds: int,
    settings: Mapping[str, Any],
    disk: Path,
    folders: Iterator[Path],
) -> None:
    """Runs, one after another, on hosts of one kind. Raises ClickException if anything is left."""
    before, setup = Before(), planned[0][0]
    with (
        small_disk(disk) if setup.small_disk else nullcontext(),
        ray_nodes(setup.hosts) as nodes,
    ):
        for each, faults in planned:
            own = {**settings, **each.settings, **dict.fromkeys(each.small_disk, disk)}
            epochs = EPOCHS * rounds * len(faults)
            with counted_run(nodes, next(folders), epochs, own) as run:
                told = {**settings, **row(settings["scaling.replicas"], faults, rounds, run)}
                print("RESULT", json.dumps(told), flush=True)
    left = before.left(nodes.folder, disk)
    if left:
        raise click.ClickException(f"left on this machine: {', '.join(left)}")


if __name__ == "__main__":
    main()
