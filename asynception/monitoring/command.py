"""`asynception status`: how is a run?"""

import json
import time
from pathlib import Path

import click

EVERY_S = 2.0
"""As often as a run publishes."""


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Show it anew every 2 s, until the run has ended.")
@click.option("--json", "as_json", is_flag=True, help="Print status.json as it is.")
def status(run: Path, watch: bool, as_json: bool) -> None:
    """How RUN is, the folder of a run that goes on or has ended.

    Workers with their speed, staleness and phases, shards, lost work, the last checkpoint and
    evaluation, and what holds the run up. Reads RUN/status.json alone, so it works on any machine
    that sees the folder.
    """
    from rich.console import Console
    from rich.live import Live

    from asynception.monitoring.page import page
    from asynception.monitoring.status_file import read_status

    values = read_status(run)
    if as_json:
        click.echo(json.dumps(values, indent=1))
        return
    console = Console()
    if not (watch and console.is_terminal):
        console.print(page(values, time.time()))
        while watch and values["status"] == "running":
            time.sleep(EVERY_S)
            values = read_status(run)
            console.print(page(values, time.time()))
        return
    with Live(page(values, time.time()), console=console, screen=False) as live:
        while values["status"] == "running":
            time.sleep(EVERY_S)
            values = read_status(run)
            live.update(page(values, time.time()), refresh=True)
