"""Figures as files, and as SVG that can stand inside a page."""

import io
import re
from pathlib import Path

from matplotlib.figure import Figure

from asynception.compare.plots import INK

PNG_DPI = 160

_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
"""Left out, so that the same runs draw the same bytes."""


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.png and NAME.svg, both on white."""
    figure.savefig(folder / f"{name}.png", dpi=PNG_DPI, facecolor="white")
    figure.savefig(folder / f"{name}.svg", facecolor="white", metadata=_METADATA)


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """An <svg> element in the colour of the text around it, as wide as its place.

    Its ids begin with `name`, since those of all figures share a page. `label` is plain text.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=_METADATA)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(INK, "currentColor", svg, flags=re.IGNORECASE)
    opening = f'<svg role="img" aria-label="{_escaped(label)}"'
    svg = re.sub(r'^<svg width="[^"]*" height="[^"]*"|^<svg', opening, svg, count=1)
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
