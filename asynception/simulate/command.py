"""Runs seeds in several processes, and says which broke a promise."""

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from asynception.simulate.run import SeedFailed, simulate

TRACE_LINES = 40
"""Of a failing seed, unless all are asked for."""

SEEDS_AT_A_TIME = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m asynception.simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="replay this one, with its whole trace")
    modes = ("async", "bounded", "sync", "averaging", "elastic")
    parser.add_argument("--mode", choices=modes)
    parser.add_argument("--harsh", action="store_true", help="also repeat Load, Cut and Release")
    parser.add_argument("--nodes", action="store_true", help="workers' nodes die as well")
    parser.add_argument("--replicas", type=int, choices=(0, 1), default=0, help="of each server")
    parser.add_argument("--elastic", action="store_true", help="workers join, leave, are scaled")
    parser.add_argument("--notices", action="store_true", help="servers' nodes are drained")
    parser.add_argument("--losses", action="store_true", help="more befalls servers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    given = parser.parse_args(arguments)
    if given.seed is not None:
        return _replay(given)
    return _run_all(given)


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    names = ("harsh", "nodes", "replicas", "elastic", "notices", "losses")
    return {name: getattr(given, name) for name in names}


def _replay(given: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    try:
        report = simulate(given.seed, given.mode, **_settings(given))
    except SeedFailed as failure:
        print("\n".join(failure.trace))
        print(failure)
        return 1
    print("\n".join(report.trace))
    print(
        f"seed {given.seed}: {report.mode}, {report.virtual_s:.1f} virtual s, trace {report.digest}"
    )
    return 0


def _run_all(given: argparse.Namespace) -> int:
    began_s, last = time.monotonic(), given.first + given.seeds
    chunks = [
        (range(first, min(last, first + SEEDS_AT_A_TIME)), given)
        for first in range(given.first, last, SEEDS_AT_A_TIME)
    ]
    totals, failures = Counter[str](), 0
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as processes:
        for counts, failed in processes.map(_run_some, chunks):
            totals += counts
            failures += len(failed)
            for text in failed:
                print(text, flush=True)
    seconds = time.monotonic() - began_s
    counted = ", ".join(f"{count} {name}" for name, count in sorted(totals.items()))
    print(f"{given.seeds} seeds in {seconds:.0f} s, {failures} failed; {counted}")
    return 1 if failures else 0


def _run_some(work: tuple[range, argparse.Namespace]) -> tuple[Counter[str], list[str]]:
    """Counts of what happened, and of each seed that failed the end of its trace."""
    torch.set_num_threads(1)
    seeds, given = work
    counts, failed = Counter[str](), []
    for seed in seeds:
        try:
            report = simulate(seed, given.mode, **_settings(given))
        except SeedFailed as failure:
            failed.append("\n".join([*failure.trace[-TRACE_LINES:], str(failure), ""]))
            continue
        counts["sessions"] += report.num_sessions
        counts["dead workers"] += report.num_worker_deaths
        counts["dead coordinators"] += report.num_coordinator_deaths
        counts["promotions"] += report.num_promotions
        counts["moves"] += report.num_moves
        counts["salvages"] += report.num_salvages
        counts["checkpoints"] += report.num_checkpoints
        counts["settled pushes"] += report.num_settled
    return counts, failed
