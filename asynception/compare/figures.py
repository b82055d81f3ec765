"""Numbers as people read them."""

from collections.abc import Callable

from asynception.compare.curves import Reach
from asynception.compare.spread import Spread

DASH = "–"
"""Between two numbers, and in place of one that isn't known."""


def number(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def measure(value: float) -> str:
    """Of a measure between 0 and 1."""
    return f"{value:.3f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def seconds(value: float) -> str:
    """As 8.4 s, 95 s, 12 min 5 s or 3 h 20 min."""
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def num_bytes(value: float) -> str:
    """In powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} TB"


def spread(value: Spread | None, shown: Callable[[float], str] = number) -> str:
    """The mean, and the range where there is one."""
    if value is None:
        return DASH
    mean, low, high = shown(value.mean), shown(value.low), shown(value.high)
    return mean if low == high else f"{mean} ({low}{DASH}{high})"


def reach(value: Reach | None, shown: Callable[[float], str] = seconds) -> str:
    """Where a level was reached."""
    if value is None:
        return DASH
    return f"at most {shown(value.x)}" if value.at_most else shown(value.x)
