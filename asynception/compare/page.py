"""The report as one HTML file: nothing in it is fetched, and nothing in it is a script."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from asynception.compare.tables import Table

PAGE = "report.html"
TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Drawing:
    """A figure as it stands in the page."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Page:
    """What the page shows, top to bottom."""

    title: str
    made: str
    sentences: Sequence[str]
    tables: Sequence[Table]
    drawings: Sequence[Drawing]
    remarks: Sequence[str]
    """What was left out, and why."""
    reservations: Sequence[str]
    machines: Sequence[str]
    details: Sequence[Table]
    """Folded away until asked for."""
    files: Sequence[str]


def render(page: Page) -> str:
    """All text is escaped; the drawings' SVG is not."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(TEMPLATE).render(page=page)
