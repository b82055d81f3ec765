"""A picture of a package with all that its authors tell about it, not rendered yet."""

from dataclasses import dataclass
from typing import NamedTuple


class Drawing(NamedTuple):
    """A file as it lies in its package."""

    content: bytes
    is_svg: bool
    """Otherwise a PNG or WebP image."""


@dataclass(frozen=True)
class Picture:
    """One picture of one source."""

    key: str
    """Of the whole set: begins with the source's name."""
    source: str
    licence: str
    concept: str
    words: frozenset[str]
    drawing: Drawing
