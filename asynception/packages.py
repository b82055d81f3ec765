"""A check that `model`, `ps`, `worker` and `protos` are ours: such names are too common."""

from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("protos", "model", "ps", "worker")

_ROOT = Path(__file__).resolve().parent.parent


def check_not_shadowed() -> None:
    """Raises ImportError if Python would import another package under one of our names."""
    for name in PACKAGES:
        spec = find_spec(name)
        origin = spec.origin if spec else None
        if origin is None or Path(origin).resolve().parent.parent != _ROOT:
            raise ImportError(
                f"asynception needs its own package {name!r} at {_ROOT / name}, but Python finds "
                f"{origin or 'none'} first: rename or move that one, or change the order of "
                f"sys.path (your own code is loaded by file, and needs no such name)"
            )
