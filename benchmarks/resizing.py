"""What `asynception scale --num-servers` costs a run: how long it stands still, and what it redoes.

A run of a recipe on a Ray of its own, which is given two servers and one server in turns while it
goes on; the rest of the command line are settings of it. Prints one line `RESULT {json}` for each
way: medians and quartiles of `pause_s`, from the last samples before to the first ones after;
`stopped_s`, of that from the end of the checkpoint on; and `redone`, samples trained on after the
checkpoint was cut. The resolution is the recipe's `run.log_every_s`, which is set to a tenth of a
second.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from measured_rows import with_spread

from asynception.compare.reading import metrics_lines
from asynception.orders import Order
from asynception.scale import scale

TIMEOUT_S = 600.0
POLL_S = 0.1
RUN = "resized"


class Run:
    """A training in a process of its own, and what it has written."""

    def __init__(self, recipe: str, settings: Sequence[str], folder: Path) -> None:
        self.path = folder / RUN
        words = ["train", recipe, "--run.name", RUN, "--run.storage_path", str(folder)]
        words += ["--run.log_every_s", "0.1", "--training.epochs", "1000000", *settings]
        command = [sys.executable, "-m", "asynception", *words]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def lines(self) -> Sequence[Mapping[str, Any]]:
        """All that is whole of metrics.jsonl."""
        return metrics_lines(self.path)

    def wait_until_it_trains(self, after: int) -> Sequence[Mapping[str, Any]]:
        """For samples in the lines from number `after` on; all of these lines."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            lines = self.lines()[after:]
            points = [line["samples"] for line in lines if line["kind"] == "train"]
            if points and max(points) > min(points):
                return lines
            if self._process.poll() is not None:
                raise click.ClickException(f"the run ended with {self._process.returncode}")
            time.sleep(POLL_S)
        raise click.ClickException(f"no samples in {TIMEOUT_S:g} s")

    def stop(self) -> None:
        """End it, and its Ray."""
        self._process.terminate()
        self._process.wait(TIMEOUT_S)


def change(run: Run, num_servers: int) -> dict[str, float]:
    """Order so many servers, and wait until these train."""
    scale(str(run.path), None, Order(num_servers=num_servers))
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (scaled := _scaled(run.lines(), num_servers)):
        if time.monotonic() > deadline_s:
            raise click.ClickException(f"not scaled in {TIMEOUT_S:g} s")
        time.sleep(POLL_S)
    lines = run.lines()
    before = [line for line in lines[:scaled] if line["kind"] == "train"][-1]
    after = [line for line in run.wait_until_it_trains(scaled) if line["kind"] == "train"]
    first = next(line for line in after if line["samples"] > after[0]["samples"])
    return {
        "pause_s": first["time_s"] - before["time_s"],
        "stopped_s": first["time_s"] - lines[scaled - 1]["time_s"],
        "redone": before["samples"] - after[0]["samples"],
    }


def _scaled(lines: Sequence[Mapping[str, Any]], num_servers: int) -> int:
    """How many lines there are up to the last change, if that is to so many servers; else 0."""
    changes = [
        (number, line["text"])
        for number, line in enumerate(lines, 1)
        if line["kind"] == "event" and line["text"].endswith(" servers")
    ]
    return changes[-1][0] if changes and changes[-1][1].endswith(f"to {num_servers} servers") else 0


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True})
@click.option("--rounds", default=5, show_default=True)
@click.option("--recipe", default="recipes/quickstart.toml", show_default=True)
@click.argument("settings", nargs=-1)
def main(rounds: int, recipe: str, settings: tuple[str, ...]) -> None:
    measured: dict[str, list[dict[str, float]]] = {"1 to 2": [], "2 to 1": []}
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, ["--scaling.num_servers", "1", *settings], Path(folder))
        try:
            run.wait_until_it_trains(0)
            for _ in range(rounds):
                for way, found in measured.items():
                    found.append(change(run, int(way[-1])))
        finally:
            run.stop()
    for way, found in measured.items():
        row: dict[str, Any] = {"servers": way, "rounds": rounds}
        for name in found[0]:
            row |= with_spread(name, [each[name] for each in found])
        print("RESULT", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
