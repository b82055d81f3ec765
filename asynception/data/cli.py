"""The command line: `asynception data pack | check | stats | index | pictograms`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from asynception.data import options
from asynception.data.options import PATH
from asynception.data.pack_command import pack
from asynception.data.pictograms.command import pictograms
from asynception.data.progress import print_lines, print_table, shown_progress
from model.errors import InputError

if TYPE_CHECKING:
    from asynception.data.shard_set import ShardSet
    from asynception.data.vocabulary import Vocabulary


@click.group()
def data() -> None:
    """Make, check and describe sets of images in shards."""


data.add_command(pack)
data.add_command(pictograms)


@data.command()
@click.argument("shards")
@options.vocabulary_file
@options.num_classes
@click.option("--decode", is_flag=True, help="Decode every image.")
@options.max_pixels
@click.option("--sha256", is_flag=True, help="Compare each file's hash with its manifest's.")
@click.option(
    "--max-lines",
    default=50,
    show_default=True,
    type=click.IntRange(min=0),
    help="Problems to print; all are counted.",
)
@options.num_workers
def check(
    shards: str,
    vocabulary_file: Path | None,
    num_classes: int | None,
    decode: bool,
    max_pixels: int,
    sha256: bool,
    max_lines: int,
    num_workers: int,
) -> None:
    """Find what is wrong with SHARDS: a manifest, a folder or a pattern; a path or a URL.

    Exit code 1 if anything is.
    """
    from asynception.data.check import check_shards
    from asynception.data.shard_set import find_shards

    found, vocabulary = find_shards(shards), options.read_vocabulary(vocabulary_file)
    if sha256 and found.manifest is None:
        raise InputError(f"--sha256 has no effect on {shards}: name a manifest, which has hashes")
    with shown_progress() as report:
        result = check_shards(
            found,
            vocabulary=vocabulary,
            num_classes=num_classes,
            max_pixels=max_pixels if decode else None,
            sha256=sha256,
            num_workers=num_workers,
            max_problems=max_lines,
            report=report,
        )
    counts = +result.problem_counts
    print_table(
        [
            ("shards", f"{result.num_shards:,} of {len(found.names):,}"),
            ("samples", f"{result.num_samples:,}"),
            ("labels", f"{result.label_counts.total():,}"),
            ("MB", f"{result.num_bytes / 1e6:,.1f}"),
            *((kind, f"{count:,}") for kind, count in counts.items()),
            ("problems", f"{counts.total():,}"),
        ]
    )
    print_lines([problem.text for problem in result.problems], counts.total())
    sys.exit(1 if counts else 0)


@data.command()
@click.argument("shards")
@click.option("--out", required=True, type=PATH, help="Plot to write: .png, .svg or .pdf.")
@click.option("--csv", "csv_file", type=PATH, help="Table of all classes to write.")
@options.vocabulary_file
@options.num_classes
@options.num_workers
def stats(
    shards: str,
    out: Path,
    csv_file: Path | None,
    vocabulary_file: Path | None,
    num_classes: int | None,
    num_workers: int,
) -> None:
    """The distribution of labels in SHARDS: a manifest, a folder or a pattern; a path or a URL."""
    from asynception.data.check import check_shards
    from asynception.data.shard_set import find_shards
    from asynception.data.stats import label_stats, write_csv, write_plot

    found, vocabulary = find_shards(shards), options.read_vocabulary(vocabulary_file)
    with shown_progress() as report:
        result = check_shards(
            found, num_classes=num_classes, num_workers=num_workers, report=report
        )
    made = label_stats(
        result.label_counts,
        result.labels_per_sample,
        _names(found, vocabulary),
        len(found.manifest.label_counts) if found.manifest else num_classes,
    )
    write_plot(made, out)
    if csv_file is not None:
        write_csv(made, csv_file)
    print_table(made.rows())
    table = Table(box=None)
    for title in ("", "label", "name", "samples"):
        table.add_column(title, justify="right" if title in ("label", "samples") else "left")
    for which, class_id, name, count in made.extremes():
        table.add_row(which, str(class_id), name, f"{count:,}")
    Console().print(table)
    if problems := result.problem_counts.total():
        click.echo(f"{problems:,} problems: `asynception data check` lists them")


@data.command()
@click.argument("shards")
@click.option(
    "--out",
    required=True,
    type=PATH,
    help="NAME.manifest.json to write, or a folder for it; beside or above the shards.",
)
@options.vocabulary_file
@options.num_classes
@options.num_workers
def index(
    shards: str, out: Path, vocabulary_file: Path | None, num_classes: int | None, num_workers: int
) -> None:
    """Write the manifest of existing SHARDS: a folder or a pattern; a path or a URL."""
    from asynception.data.index import index_shards
    from asynception.data.shard_set import find_shards

    found, vocabulary = find_shards(shards), options.read_vocabulary(vocabulary_file)
    with shown_progress() as report:
        path, manifest = index_shards(
            found,
            out,
            vocabulary=vocabulary,
            num_classes=num_classes,
            num_workers=num_workers,
            report=report,
        )
    click.echo(f"{path}: {len(manifest.shards):,} shards, {manifest.num_samples:,} samples")


def _names(shards: "ShardSet", vocabulary: "Vocabulary | None") -> tuple[str, ...] | None:
    if vocabulary is not None:
        return vocabulary.names
    return shards.manifest.class_names if shards.manifest is not None else None
