"""`asynception compare`: modes under equal conditions, or runs that are there already."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from model.errors import InputError

if TYPE_CHECKING:
    from asynception.compare.options import Conditions
    from asynception.compare.reading import RunRecord

_ARGUMENTS = {"ignore_unknown_options": True, "allow_interspersed_args": True}


@click.command(context_settings=_ARGUMENTS)
@click.option("--modes", help="Values of consistency.mode, like async,sync; the first is the base.")
@click.option("--seeds", type=click.IntRange(min=1), help="Runs of each mode.  [default: 3]")
@click.option("--samples", type=click.IntRange(min=1), help="Images that each run trains on.")
@click.option("--budget", help="Time that each run trains for, like 90s, 10m or 2h.")
@click.option(
    "--slow", multiple=True, help="WORKERxFACTOR: 1x20 makes worker 1 take 20 times as long."
)
@click.option("--target", type=float, help="Level of the metric to which time is taken.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the comparison.")
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED)
def compare(
    arguments: tuple[str, ...],
    modes: str | None,
    seeds: int | None,
    samples: int | None,
    budget: str | None,
    slow: tuple[str, ...],
    target: float | None,
    out: Path | None,
) -> None:
    """Compare training modes: RECIPE --modes async,sync [--section.key value ...], or RUN RUN ...

    With --modes, RECIPE is trained in each mode with each seed, one run after another, and what
    is there already is not run again. Without, runs or earlier comparisons are named. Writes
    report.html, plots and tables into --out.
    """
    from asynception.compare.options import Conditions, check_budget, parse_modes, parse_slow

    paths, overrides = _split(arguments)
    if modes is None:
        given = {"--seeds": seeds, "--samples": samples, "--budget": budget, "--slow": slow}
        _check_runs_alone(overrides, [name for name, value in given.items() if value])
        _compare_runs(paths, target, out)
        return
    if len(paths) != 1:
        raise InputError(f"--modes {modes} needs one recipe, and here are {len(paths)}")
    conditions = Conditions(seeds or 3, samples, check_budget(samples, budget), parse_slow(slow))
    _compare_modes(paths[0], parse_modes(modes), conditions, overrides, target, out)


def _split(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Paths come first, then overrides."""
    first = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    return [Path(word) for word in arguments[:first]], list(arguments[first:])


def _check_runs_alone(overrides: Sequence[str], options: Sequence[str]) -> None:
    unused = [*options, *overrides[:1]]
    if unused:
        raise InputError(
            f"{unused[0]} has no effect on runs that are there already: remove it, or give --modes "
            "to train a recipe"
        )


def _compare_runs(paths: Sequence[Path], target: float | None, out: Path | None) -> None:
    from asynception.compare.reading import find_runs, read_run

    found = find_runs(paths)
    runs = [read_run(path) for path in found]
    if len(runs) < 2:
        raise InputError(
            f"{paths[0]} is one run: name two or more, or give --modes to train a recipe"
        )
    if out is None:
        raise InputError("--out is missing: name a folder for the report")
    _report(runs, out, target, f"{len(runs)} runs compared")


def _compare_modes(
    recipe: Path,
    modes: Sequence[str],
    conditions: "Conditions",
    overrides: Sequence[str],
    target: float | None,
    out: Path | None,
) -> None:
    from asynception.compare.grid import plan_runs
    from asynception.compare.reading import read_planned
    from asynception.compare.running import run_all
    from asynception.failures import TrainingFailed

    out = out or Path("runs") / f"compare-{recipe.stem}"
    planned = plan_runs(recipe, modes, conditions, overrides, out)
    run_all(planned, out, click.echo)
    runs = [read_planned(run) for run in planned]
    _report(runs, out, target, f"{recipe.stem}: {', '.join(modes)} compared")
    failed = [run for run in runs if not run.finished]
    if failed:
        first = failed[0]
        raise TrainingFailed(
            f"{len(failed)} of {len(runs)} runs failed, {first.name} with: {first.error}"
        )


def _report(runs: Sequence["RunRecord"], out: Path, target: float | None, title: str) -> None:
    from asynception.compare.page import PAGE
    from asynception.compare.report import write_report

    for sentence in write_report(runs, out, target, title):
        click.echo(f"- {sentence}")
    click.echo(f"{out / PAGE}")
