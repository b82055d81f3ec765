"""Options that several commands of `asynception data` share."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from asynception.data.vocabulary import Vocabulary

PATH = click.Path(path_type=Path)


def options(*options: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One decorator of several."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


num_workers = click.option(
    "--num-workers",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Processes; the outcome is the same with any number.",
)
vocabulary_file = click.option(
    "--labels",
    "vocabulary_file",
    type=PATH,
    help="Vocabulary: a text file with the name of class i on line i.",
)
num_classes = click.option(
    "--num-classes", type=click.IntRange(min=1), help="Labels are ids below it."
)
max_pixels = click.option(
    "--max-pixels",
    default=64_000_000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Larger images count as corrupt.",
)


def read_vocabulary(path: Path | None) -> "Vocabulary | None":
    """Raises InputError."""
    from asynception.data.vocabulary import Vocabulary

    return None if path is None else Vocabulary.read(path)
