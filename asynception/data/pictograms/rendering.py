"""Drawings as small opaque PNG images: the same bytes in any number of processes."""

import io
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from PIL import Image

from asynception.data.pictograms.picture import Drawing
from model.errors import InputError

_CHUNK_SIZE = 64


def check_renderer() -> None:
    """Raises InputError if SVG can't be rendered here."""
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise InputError(
            "resvg_py is missing, so icons can't be rendered: `pip install resvg-py`"
        ) from None


def render_all(drawings: Sequence[Drawing], size: int, num_workers: int) -> Iterator[bytes]:
    """The PNG of each drawing, in order, `size` x `size` pixels."""
    render_one = partial(render, size=size)
    if num_workers == 1:
        yield from map(render_one, drawings)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context) as pool:
        yield from pool.map(render_one, drawings, chunksize=_CHUNK_SIZE)


def render(drawing: Drawing, size: int) -> bytes:
    """The drawing on white as a PNG, 8 bits gray if it has no colours, else 8 bits RGB."""
    content = _rasterize(drawing.content, size) if drawing.is_svg else drawing.content
    with Image.open(io.BytesIO(content)) as image:
        picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    opaque = Image.alpha_composite(white, picture).convert("RGB")
    if opaque.size != (size, size):
        opaque = opaque.resize((size, size), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    _without_colours(opaque).save(out, "PNG", optimize=True)
    return out.getvalue()


def _rasterize(svg: bytes, size: int) -> bytes:
    """A PNG with transparency. The machine's fonts stay out of it, so that all draw the same."""
    import resvg_py

    return resvg_py.svg_to_bytes(
        svg_string=svg.decode(), width=size, height=size, skip_system_fonts=True
    )


def _without_colours(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return red if red.tobytes() == green.tobytes() == blue.tobytes() else image
