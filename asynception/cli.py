"""The command line: `asynception train | evaluate | export | info | models | data | ...`."""

import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from asynception.attached_commands import attach, scale, stop
from asynception.compare.command import compare
from asynception.data.cli import data
from asynception.doctor.command import doctor
from asynception.monitoring.command import status
from model.errors import InputError

if TYPE_CHECKING:
    from asynception.export import Format

_OVERRIDES: dict[str, Any] = {"ignore_unknown_options": True, "allow_interspersed_args": True}


class _OneLine(click.Group):
    """Bad input and failed runs get one line; exit codes 2 and 1.

    Ctrl-C exits with 130, SIGTERM with 143, after the same cleaning up.
    """

    def invoke(self, ctx: click.Context) -> Any:
        from asynception.failures import Stopped, TrainingFailed

        received = [signal.SIGINT]

        def terminate(number: int, _: object) -> None:
            received.append(signal.Signals(number))
            raise KeyboardInterrupt  # what Ray's own calls turn every exception of a handler into

        before = signal.signal(signal.SIGTERM, terminate)
        try:
            return super().invoke(ctx)
        except InputError as error:
            _fail(error, 2)
        except TrainingFailed as error:
            _fail(error, 1)
        except Stopped as error:
            _fail(error, 128 + signal.SIGTERM)
        except KeyboardInterrupt as interrupt:
            _fail(str(interrupt) or f"stopped by {received[-1].name}", 128 + received[-1])
        finally:
            signal.signal(signal.SIGTERM, before)


def _fail(message: object, code: int) -> None:
    click.echo(f"error: {' '.join(str(message).split())}", err=True)
    sys.exit(code)


class _WithSettings(click.Command):
    """Lists every setting in --help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from asynception.recipe import describe_settings

        with formatter.section("Settings (--section.key value)"):
            formatter.write_dl([(f"--{key}", text) for key, text in describe_settings()])


def _recipe_arguments(command: Callable[..., None]) -> Callable[..., None]:
    command = click.argument("overrides", nargs=-1, type=click.UNPROCESSED)(command)
    return click.argument("recipe", type=click.Path(path_type=Path))(command)


@click.group(cls=_OneLine)
@click.version_option(package_name="asynception")
def main() -> None:
    """Asynchronous parameter-server training for PyTorch on Ray."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


main.add_command(attach)
main.add_command(compare)
main.add_command(data)
main.add_command(doctor)
main.add_command(scale)
main.add_command(status)
main.add_command(stop)


@main.command(cls=_WithSettings, context_settings=_OVERRIDES)
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
@click.option("--detach", is_flag=True, help="Set run.detached: train on without this process.")
@_recipe_arguments
def train(recipe: Path, overrides: tuple[str, ...], resume: bool, detach: bool) -> None:
    """Train RECIPE, a .toml file or the folder of an earlier run."""
    from asynception.recipe import load_config
    from asynception.trainer import Trainer

    overrides += ("--run.detached", "true") if detach else ()
    result = Trainer(load_config(recipe, overrides), resume=resume).fit()
    click.echo(result.to_json(), nl=False)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--checkpoint", help="Name of a checkpoint of the run; the last one otherwise.")
@click.option("--raw", is_flag=True, help="Evaluate the parameters themselves, not their EMA.")
def evaluate(run: Path, checkpoint: str | None, raw: bool) -> None:
    """Evaluate a checkpoint of RUN on its held-out images."""
    from asynception.saved import evaluate_saved, find_checkpoint

    path = find_checkpoint(run, checkpoint)
    metrics = evaluate_saved(run, path, ema=not raw)
    click.echo(json.dumps({"checkpoint": str(path), "ema": not raw, "eval": metrics}, indent=1))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--checkpoint", help="Name of a checkpoint of the run; the last one otherwise.")
@click.option("--ema", is_flag=True, help="Export the EMA instead of the parameters themselves.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors", "timm", "torch-export", "onnx"]),
    default="safetensors",
    show_default=True,
    help="State dict; that of timm's legacy_xception; a .pt2 program; an .onnx model.",
)
def export(run: Path, out: Path, checkpoint: str | None, ema: bool, file_format: "Format") -> None:
    """Write a checkpoint of RUN as one file for other programs.

    Images go in as float32 in [-1, 1], (N, 3, H, W).
    """
    from asynception.export import NOTES, export_saved
    from asynception.saved import find_checkpoint

    path = find_checkpoint(run, checkpoint)
    export_saved(run, path, out, ema=ema, file_format=file_format)
    click.echo(f"{out}: {'EMA' if ema else 'parameters'} of {path}")
    if file_format in NOTES:
        click.echo(NOTES[file_format])


@main.command("import-keras")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", "name", required=True, help="xception, inception_v3 or inception_v3_2016.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
def import_keras(file: Path, name: str, out: Path) -> None:
    """Write FILE, a .h5 or .weights.h5 of Keras's, as safetensors for --model.weights."""
    from asynception.keras_import import import_keras

    num_classes = import_keras(file, name, out)
    click.echo(f"{out}: {name} with {num_classes} classes, from {file}")


@main.command(cls=_WithSettings, context_settings=_OVERRIDES)
@click.option(
    "--step-s",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds of one batch's gradient in one worker: also say which servers that needs.",
)
@click.option(
    "--network-gbit",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Of each node, each way; for --step-s.",
)
@_recipe_arguments
def info(
    recipe: Path, overrides: tuple[str, ...], step_s: float | None, network_gbit: float
) -> None:
    """What RECIPE will take: parameters, bytes, shards, memory."""
    from asynception.info import describe
    from asynception.recipe import load_config

    table = Table(show_header=False, box=None)
    for name, value in describe(load_config(recipe, overrides), step_s, network_gbit):
        table.add_row(name, value)
    Console().print(table)


@main.command()
@click.option("--num-classes", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--image-size", type=click.IntRange(min=1), help="Pixels; each model's own if left.")
def models(num_classes: int, image_size: int | None) -> None:
    """Every model that [model] name can choose, and what it costs."""
    from asynception.info import describe_models

    table = Table(box=None)
    header, *rows = describe_models(num_classes, image_size)
    for title in header:
        table.add_column(title, no_wrap=True, justify="left" if title == header[0] else "right")
    for row in rows:
        table.add_row(*row)
    # As wide as it needs to be, also where there is no terminal: names are there to be copied.
    Console(width=max(Console().width, 100)).print(table)
    click.echo(
        "MACs: multiply-accumulates forward, per image. Activations: kept for backward, per image,"
        " float32.\nAlso timm:NAME and torchvision:NAME where installed, and --model.factory"
        " path/to/file.py:function."
    )
