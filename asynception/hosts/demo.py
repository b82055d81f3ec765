"""A training over three hosts on one machine, submitted as a job, that loses a host on the way.

Makes three hosts from network namespaces, starts a Ray node in each, and submits a recipe with
`ray job submit`: the server on the first host, a worker on each of the others. Once all are at
work, everything on the last host gets SIGKILL, and the run goes on without its worker. Then the
host comes back, and so does the worker. Ends with the run's result, and with nothing left on the
machine. Needs root, and ray[default] for the job server.

--section.key=value, as often as wanted, goes to the training.
"""

import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from asynception.hosts.namespaces import lacking, namespaces
from asynception.hosts.ray_nodes import NodeOptions, RayNodes, ray_nodes

NODES = (
    NodeOptions(num_cpus=1, resources={"server": 1}),
    NodeOptions(num_cpus=1, resources={"worker": 1}),
    NodeOptions(num_cpus=1, resources={"worker": 1}),
)
VICTIM = 2

PICTOGRAMS = "pictograms.toml"
"""The recipe whose images are built if they aren't there."""

JOB_SERVER = "aiohttp_cors"
"""A package that only ray[default] brings, and that Ray's job server needs."""


def settings(folder: Path, samples: int) -> dict[str, Any]:
    """Over the recipe's. folder: where the run is kept."""
    return {
        "ray.address": "auto",
        "run.name": "demo",
        "run.storage_path": folder,
        "run.log_every_s": 3,
        "training.epochs": "none",
        "training.samples": samples,
        "scaling.num_workers": 2,
        "scaling.num_servers": 1,
        "scaling.resources_per_server": '{"server" = 1}',
        "scaling.resources_per_worker": '{"CPU" = 1, "worker" = 1}',
    }


class Job:
    """A submitted training, whose lines are shown, and what is done as they come."""

    def __init__(self, nodes: RayNodes) -> None:
        self._nodes = nodes
        self._steps = [
            ("workers 2", self._kill_host),
            ("waits for room", lambda: None),
            ("workers 1", self._return_host),
        ]
        """What a line says, and what is then done, one after another."""

    def submit(self, recipe: Path, options: Mapping[str, Any], overrides: Sequence[str]) -> int:
        """Returns the exit code of `ray job submit`."""
        submit = ["job", "submit", "--address", self._nodes.dashboard_url]
        given = [f"--{key}={value}" for key, value in options.items()]
        train = ["train", str(recipe), *given, *overrides]
        _say(shlex.join(["ray", *submit, "--", "asynception", *train]))
        command = [sys.executable, "-m", "ray.scripts.scripts", *submit, "--"]
        with subprocess.Popen(
            self._nodes.command(0, [*command, sys.executable, "-m", "asynception", *train]),
            env=self._nodes.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as job:
            assert job.stdout is not None
            for line in job.stdout:
                click.echo(line, nl=False)
                self._act(line)
            return job.wait()

    def _act(self, line: str) -> None:
        if self._steps and self._steps[0][0] in line:
            _, act = self._steps.pop(0)
            act()

    def _kill_host(self) -> None:
        host = self._nodes.hosts[VICTIM]
        _say(f"SIGKILL to all {len(host.namespace.pids())} processes of {host.address}")
        self._nodes.kill(VICTIM)

    def _return_host(self) -> None:
        _say(f"{self._nodes.hosts[VICTIM].address} comes back")
        self._nodes.restart(VICTIM)


def _say(text: str) -> None:
    click.secho(f"--- {text}", bold=True)


def _summary(folder: Path) -> str:
    result = json.loads((folder / "demo" / "result.json").read_text())
    names = ("status", "samples", "updates", "worker_failures", "restarts", "eval", "baseline")
    return json.dumps({name: result[name] for name in names})


def provide_pictograms(recipe: Path) -> None:
    """Build the set of images that recipes/pictograms.toml trains on, unless it is there."""
    folder = recipe.with_suffix("")
    if recipe.name != PICTOGRAMS or (folder / "train.manifest.json").exists():
        return
    _say(f"{folder} is not there: building it takes 80 s of one core and 110 MB from npm")
    build = ["data", "pictograms", "--out", str(folder)]
    if subprocess.run([sys.executable, "-m", "asynception", *build], check=False).returncode:
        raise click.ClickException(
            "no pictograms to train on; `make cluster-demo RECIPE=recipes/quickstart.toml` takes "
            "images that lie in the repository"
        )


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True})
@click.option(
    "--recipe",
    default=f"recipes/{PICTOGRAMS}",
    show_default=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Its data must be at hand; the pictograms are built if they aren't.",
)
@click.option("--samples", default=50_000, show_default=True, help="Images to train on.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def main(recipe: Path, samples: int, overrides: tuple[str, ...]) -> None:
    reason = lacking()
    if reason:
        raise click.ClickException(f"{reason}: no hosts were made")
    if importlib.util.find_spec(JOB_SERVER) is None:
        raise click.ClickException(
            "Ray's job server is not installed: pip install 'ray[default]', as make cluster-demo "
            "does"
        )
    provide_pictograms(recipe)
    with tempfile.TemporaryDirectory() as name, ray_nodes(NODES, dashboard=True) as nodes:
        _say(f"Ray on {', '.join(host.address for host in nodes.hosts)}")
        code = Job(nodes).submit(recipe.absolute(), settings(Path(name), samples), overrides)
        if code:
            raise click.ClickException(f"the job ended with {code}")
        _say(_summary(Path(name)))
    left = [name for name in (host.namespace.name for host in nodes.hosts) if name in namespaces()]
    _say(f"hosts left on this machine: {len(left)}")


if __name__ == "__main__":
    main()
