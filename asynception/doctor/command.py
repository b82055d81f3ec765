"""`asynception doctor`: is this environment fit for a long run?"""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from model.errors import InputError

if TYPE_CHECKING:
    from asynception.config import TrainConfig
    from asynception.doctor.finding import Finding

_ARGUMENTS = {"ignore_unknown_options": True, "allow_interspersed_args": True}


@click.command(context_settings=_ARGUMENTS)
@click.option("--address", help="HOST:PORT of a Ray cluster, or auto: examine all of its nodes.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def doctor(
    recipe: str | None, overrides: tuple[str, ...], address: str | None, as_json: bool
) -> None:
    """Check this machine, or a Ray cluster, before a long run: RECIPE [--section.key value ...]

    Says of each check whether it is ok, what was found, and what to do about it. With a recipe,
    memory, ports, room and data are checked against it. Exits with 1 if a check failed.
    """
    if recipe is not None and recipe.startswith("--"):
        raise InputError(f"option {recipe} is for a recipe: name that first")
    config = _load(recipe, overrides)
    from asynception.doctor import report
    from asynception.doctor.timed import threads_left

    findings = _collected(config, address)
    if as_json:
        click.echo(report.as_json(findings))
    else:
        report.print_report(findings, Console())
    code = 1 if report.num_failed(findings) else 0
    if threads_left():
        # The interpreter's end would wait for what these wait for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _load(recipe: str | None, overrides: tuple[str, ...]) -> "TrainConfig | None":
    if recipe is None:
        return None
    from asynception.recipe import load_config

    return load_config(Path(recipe), overrides)


def _collected(config: "TrainConfig | None", address: str | None) -> "list[Finding]":
    """All findings; on a terminal, the check that was last is told meanwhile."""
    from asynception.doctor.examination import examine

    findings = []
    # What Ray prints of its nodes meanwhile is no part of the report.
    with redirect_stdout(sys.stderr), Console(stderr=True).status("examining") as status:
        for finding in examine(config, address):
            findings.append(finding)
            status.update(f"examining: {len(findings)} checks done, last {finding.check}")
    return findings
