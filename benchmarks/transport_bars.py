"""The bars that transport is held to, and by how much rows of results meet or miss them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from measured_rows import Row

SOCKET_PEERS = ("torchft", "torchft_system_tcp", "torch_rpc", "tensorflow")


@dataclass(frozen=True)
class Verdict:
    """A measured ratio beside its bar."""

    what: str
    where: str
    """Workers, shards, or which rule."""
    value: float
    low: float
    high: float
    bar: float
    at_least: bool
    """Else the bar is the most that the value may be."""

    @property
    def met(self) -> bool:
        """By the median."""
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def missed_by(self) -> float:
        """As a share of the bar; 0 where it is met."""
        excess = (self.value - self.bar) / self.bar
        return 0.0 if self.met else abs(excess)


@dataclass(frozen=True)
class _Bar:
    what: str
    bar: float
    at_least: bool
    rows: Callable[[Row], bool]
    figures: Sequence[str]
    """Names of ratios in those rows; each has to meet the bar."""


def _lane(name: str, *works: str) -> Callable[[Row], bool]:
    return lambda row: row["what"] == name and row.get("work") in works


def _what(name: str) -> Callable[[Row], bool]:
    return lambda row: bool(row["what"] == name)


_BYTES = ("x_pull", "x_push", "x_moved")

_BARS = (
    _Bar(
        "shm: cycle / (memcpy + fused update)", 1.25, False, _lane("shm", "momentum"), ["x_limit"]
    ),
    _Bar("shm: updates/s / Ray tuned", 2.5, True, _lane("shm", "sgd"), ["x ray_tuned"]),
    _Bar("tcp: GB/s / plain sockets", 0.9, True, _lane("tcp", "bytes"), _BYTES),
    _Bar("tcp: updates/s / best socket peer", 1.25, True, _lane("tcp", "sgd"), ["x_best_peer"]),
    _Bar("grpc: GB/s / bare gRPC stream", 0.9, True, _lane("grpc", "bytes"), _BYTES),
    _Bar("fused kernel / C -O3", 1.1, False, _what("kernel"), ["x C -O3"]),
    _Bar(
        "compute-bound: steps/s / local optimizer", 0.9, True, _what("compute-bound"), ["x_local"]
    ),
    _Bar("largest / smallest shard's bytes", 1.01, False, _what("balance"), ["x_smallest"]),
)


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """All bars that the rows speak of, in the order of the bars."""
    rows = [_with_best_peer(row) for row in rows]
    return [
        verdict for bar in _BARS for row in rows if bar.rows(row) for verdict in _held(bar, row)
    ]


def _held(bar: _Bar, row: Row) -> Iterator[Verdict]:
    for figure in bar.figures:
        if figure in row:
            low, high = row.get(f"{figure}_quartiles", [row[figure], row[figure]])
            part = figure.removeprefix("x_") if len(bar.figures) > 1 else ""
            where = ", ".join(filter(None, (part, _where(row))))
            yield Verdict(bar.what, where, row[figure], low, high, bar.bar, bar.at_least)


def _where(row: Row) -> str:
    """What tells a row from others under the same bar."""
    told = [str(row[key]) for key in ("rule", "mode", "best_peer") if key in row]
    counts = [
        f"{row[key]} {_counted(key, row[key])}" for key in ("workers", "shards") if key in row
    ]
    return ", ".join((*told, *counts))


def _counted(key: str, count: int) -> str:
    return key if count != 1 else key.removesuffix("s")


def _with_best_peer(row: Row) -> Row:
    """With the least of the ratios to peers that use sockets, for rows that have any."""
    ratios = {peer: row[f"x {peer}"] for peer in SOCKET_PEERS if f"x {peer}" in row}
    if not ratios:
        return row
    best = min(ratios, key=lambda peer: ratios[peer])
    quartiles = row[f"x {best}_quartiles"]
    return {
        **row,
        "best_peer": best,
        "x_best_peer": ratios[best],
        "x_best_peer_quartiles": quartiles,
    }


def table(found: Iterable[Verdict]) -> Iterator[str]:
    """Lines of a markdown table."""
    yield "| bar | where | median (quartiles) | bar | |"
    yield "|---|---|---|---|---|"
    for each in found:
        bar = f"{'at least' if each.at_least else 'at most'} {each.bar:g}"
        verdict = "met" if each.met else f"**missed by {100 * each.missed_by:.0f} %**"
        spread = f"{each.value:.3g} ({each.low:.3g}-{each.high:.3g})"
        yield f"| {each.what} | {each.where} | {spread} | {bar} | {verdict} |"
