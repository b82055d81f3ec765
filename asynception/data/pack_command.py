"""`asynception data pack`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asynception.data import options
from asynception.data.options import PATH
from asynception.data.progress import print_lines, print_table, shown_progress
from model.errors import InputError

if TYPE_CHECKING:
    from asynception.data.listing import LabelKind, Listing
    from asynception.data.pack_plan import PackSettings
    from asynception.data.vocabulary import Vocabulary

_CORRUPT_SHOWN = 20

_source_options = options.options(
    click.option("--path-column", default="path", show_default=True, help="Of a table."),
    click.option("--labels-column", default="labels", show_default=True, help="Of a table."),
    click.option(
        "--separator", default="|", show_default=True, help="Between labels in a table's cell."
    ),
    click.option(
        "--label-kind",
        type=click.Choice(["auto", "names", "ids"]),
        default="auto",
        show_default=True,
        help="Of a table's labels; auto takes texts for names, and refuses numbers in CSV.",
    ),
    click.option("--images", type=PATH, help="Folder of the images that a table lists."),
    click.option("--open-images", type=PATH, help="Open Images' CSV of image-level labels."),
    click.option("--classes", type=PATH, help="Open Images' CSV of class descriptions."),
    click.option(
        "--min-confidence", default=0.5, show_default=True, help="Of a label of Open Images."
    ),
)
_content_options = options.options(
    click.option("--split", default="train", show_default=True, help="Names of shards begin so."),
    click.option(
        "--val-share",
        default=0.0,
        type=click.FloatRange(0, 1, max_open=True),
        help="Share to hold out, by a hash of the keys.",
    ),
    click.option("--val-split", default="val", show_default=True, help="Name of that share."),
    click.option(
        "--min-count",
        default=1,
        show_default=True,
        type=click.IntRange(min=1),
        help="Images of a class that the vocabulary is to name, where none is given.",
    ),
    click.option(
        "--unknown-labels",
        type=click.Choice(["error", "drop"]),
        default="error",
        show_default=True,
        help="What happens to labels outside the vocabulary.",
    ),
    click.option("--keep-unlabelled", is_flag=True, help="Write images without a label, too."),
    click.option(
        "--max-missing",
        default=0,
        show_default=True,
        type=click.IntRange(min=0),
        help="Images that may be listed but not there.",
    ),
    click.option("--verify", is_flag=True, help="Decode each image, and leave out corrupt ones."),
    click.option(
        "--max-corrupt",
        default=100,
        show_default=True,
        type=click.IntRange(min=0),
        help="Images that --verify may leave out.",
    ),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**64 - 1)),
)


@click.command()
@click.argument("source", required=False, type=PATH)
@click.option("--out", required=True, type=PATH, help="Folder to write shards into.")
@options.vocabulary_file
@options.num_classes
@_source_options
@_content_options
@click.option("--shard-mb", default=250.0, show_default=True, help="Size of a shard, 10^6 bytes.")
@options.max_pixels
@options.num_workers
def pack(
    source: Path | None,
    out: Path,
    vocabulary_file: Path | None,
    num_workers: int,
    shard_mb: float,
    path_column: str,
    labels_column: str,
    separator: str,
    label_kind: "LabelKind",
    images: Path | None,
    open_images: Path | None,
    classes: Path | None,
    min_confidence: float,
    **settings: Any,
) -> None:
    """Write shards from SOURCE: a folder of class folders, or a CSV or Parquet of (path, labels).

    With --open-images, --classes and --images, Open Images' own files are the source. Started
    again after an interruption, it goes on.
    """
    from asynception.data.pack_plan import PackSettings

    if shard_mb <= 0:
        raise InputError(f"--shard-mb={shard_mb:g} leaves no room for an image: give more than 0")
    made = PackSettings(shard_num_bytes=max(1, round(shard_mb * 1e6)), **settings)
    vocabulary = options.read_vocabulary(vocabulary_file)
    if open_images is not None:
        if source is not None or classes is None or images is None:
            raise InputError(
                f"--open-images={open_images}: needs --classes and --images, and no SOURCE"
            )
        from asynception.data.open_images import list_open_images

        listing = list_open_images(
            open_images, classes, images, min_confidence=min_confidence, vocabulary=vocabulary
        )
    else:
        columns = (path_column, labels_column, separator, label_kind)
        listing = _listing(source, images, made.split, columns)
    _pack(listing, out, made, vocabulary, num_workers)


def _listing(
    source: Path | None,
    images: Path | None,
    split: str,
    columns: "tuple[str, str, str, LabelKind]",
) -> "Listing":
    from asynception.data.image_folders import list_image_folder
    from asynception.data.tables import TABLE_SUFFIXES, list_table

    if source is None:
        raise InputError("SOURCE is missing: name a folder or a table, or give --open-images")
    if source.is_dir():
        return list_image_folder(source, split)
    if source.suffix.lower() not in TABLE_SUFFIXES or not source.exists():
        raise InputError(
            f"{source}: is neither a folder nor a table ({', '.join(TABLE_SUFFIXES)}): check the "
            "path"
        )
    path_column, labels_column, separator, label_kind = columns
    if not separator:
        raise InputError("--separator is empty, so labels can't be told apart: give a character")
    return list_table(
        source,
        images,
        path_column=path_column,
        labels_column=labels_column,
        separator=separator,
        label_kind=label_kind,
    )


def _pack(
    listing: "Listing",
    out: Path,
    settings: "PackSettings",
    vocabulary: "Vocabulary | None",
    num_workers: int,
) -> None:
    from asynception.data.pack import pack

    with shown_progress() as report:
        result = pack(
            listing, out, settings, vocabulary=vocabulary, num_workers=num_workers, report=report
        )
    rows = []
    for split, manifest in result.manifests.items():
        classes = f"{len(manifest.label_counts):,} classes"
        size = f"{len(manifest.shards):,} shards, {manifest.num_bytes / 1e6:,.1f} MB"
        rows.append((split, f"{manifest.num_samples:,} samples, {classes}, {size}"))
    if result.num_resumed:
        rows.append(("shards of an earlier run", f"{result.num_resumed:,}"))
    rows += [(f"left out: {what}", f"{count:,}") for what, count in result.left_out.items()]
    print_table(rows)
    lines = [f"{each.key}: {each.reason}" for each in result.corrupt[:_CORRUPT_SHOWN]]
    print_lines(lines, len(result.corrupt))
