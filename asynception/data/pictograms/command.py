"""`asynception data pictograms`."""

import os
from pathlib import Path

import click

from asynception.data import options


@click.command()
@click.option(
    "--out",
    required=True,
    type=options.PATH,
    help="Folder to build into; new or empty.",
)
@click.option(
    "--packages",
    "archives",
    type=options.PATH,
    help="Folder of the npm packages' archives; those missing are fetched into it with npm."
    "  [default: pictograms in the user's cache]",
)
@click.option(
    "--size",
    type=click.IntRange(8, 1024),
    default=64,
    show_default=True,
    help="Pixels of an image's edge.",
)
@click.option(
    "--min-count",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Training images that must carry a word for it to be a label.",
)
@click.option(
    "--val-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the concepts that is held out.",
)
@options.num_workers
def pictograms(
    out: Path,
    archives: Path | None,
    size: int,
    min_count: int,
    val_share: float,
    num_workers: int,
) -> None:
    """Build an openly licensed set of icons and emoji with several labels each.

    About 30,000 images and 4,700 labels, from nine npm packages of pinned versions (110 MB);
    docs/pictograms.md tells how.
    """
    from asynception.data.pictograms.building import PictogramSettings, build

    settings = PictogramSettings(size=size, min_count=min_count, val_share=val_share)
    built = build(
        out,
        _user_cache() if archives is None else archives,
        settings,
        num_workers=num_workers,
        report=lambda line: click.echo(line, err=True),
    )
    for source, num_images in sorted(built.num_images.items(), key=lambda item: -item[1]):
        click.echo(f"{source:18} {num_images:6,}")
    click.echo(
        f"{out}: {built.train.num_samples:,} training and {built.val.num_samples:,} held-out "
        f"images, {built.num_labels:,} labels"
    )


def _user_cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "asynception" / "pictograms"
