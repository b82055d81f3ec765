"""Tables and a drawing from the `RESULT` lines of the benchmarks of transport.

    python benchmarks/transport_report.py LOG... --out docs/transport

Writes the rows beside each other as OUT.jsonl, draws where the time of a cycle goes in each lane as
OUT.svg, and puts the tables between the two comments `results` of OUT.md.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import click
import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from measured_rows import Row
from transport_bars import table, verdicts

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
LANES = ("shm", "tcp", "grpc")
LIMIT = "limit:\nmemcpy + update"
PARTS = {
    "pull": "C0",
    "push, bytes and messages": "C1",
    "check for NaN and Inf": "C2",
    "update": "C3",
}


def rows_in(lines: Iterable[str]) -> list[Row]:
    """The rows of all lines that hold one."""
    found = (line.strip().removeprefix("RESULT ") for line in lines)
    return [json.loads(line) for line in found if line.startswith("{")]


def cycle_parts(row: Row, update_ms: float) -> dict[str, float]:
    """Milliseconds of one cycle of a single worker, by part.

    The shard's part of a push is the check and the update; the update alone was measured by itself
    in the same rounds, and what the shard took longer than that is put down to the check.
    """
    update = min(update_ms, row["shard_ms"])
    moved = row["push_ms"] - row["shard_ms"]
    return dict(zip(PARTS, (row["pull_ms"], moved, row["shard_ms"] - update, update), strict=True))


def _one(rows: Iterable[Row], **wanted: object) -> Row | None:
    return next((r for r in rows if all(r.get(key) == v for key, v in wanted.items())), None)


def cycles(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Parts of the cycle of one worker and one server by lane, and of its limit."""
    found: dict[str, dict[str, float]] = {}
    for lane in LANES:
        cell = {"work": "momentum", "workers": 1, "shards": 1, "lane": lane}
        row = _one(rows, what=lane, **cell)
        update, memcpy = (
            _one(rows, what="fused update", **cell),
            _one(rows, what="memcpy", lane=lane),
        )
        if row and update and memcpy:
            found[lane] = cycle_parts(row, update["cycle_ms"])
            limit = {"pull": memcpy["cycle_ms"], "update": update["cycle_ms"]}
            found = {LIMIT: limit, **found}
    return found


def draw(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """One bar for each lane, cut into its parts."""
    matplotlib.rcParams.update({"svg.hashsalt": "asynception", "svg.fonttype": "none"})
    figure, axis = pyplot.subplots(figsize=(8, 0.6 + 0.5 * len(found)))
    names = list(found)[::-1]
    left = dict.fromkeys(names, 0.0)
    for part, colour in PARTS.items():
        widths = [found[name].get(part, 0.0) for name in names]
        axis.barh(names, widths, left=list(left.values()), color=colour, label=part)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    axis.set_xlabel("ms for one cycle: 1 worker, 1 server, 22.9 M parameters, momentum and EMA")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _cell(row: Row, figure: str) -> str:
    if figure not in row:
        return ""
    quartiles = row.get(f"{figure}_quartiles")
    spread = f" ({quartiles[0]:.3g}-{quartiles[1]:.3g})" if quartiles else ""
    return f"{row[figure]:.3g}{spread}"


def _plain(row: Row, figure: str) -> str:
    return f"{row[figure]:.3g}" if figure in row else ""


Show = Callable[[Row, str], str]
LANE_COLUMNS: Mapping[str, tuple[str, Show]] = {
    "updates/s": ("updates_per_s", _cell),
    "GB/s, both ways": ("gbps", _plain),
    "pull GB/s": ("pull_gbps", _plain),
    "push GB/s": ("push_gbps", _plain),
    "server CPU s/GB": ("server_cpu_s_per_gb", _plain),
    "worker CPU s/GB": ("worker_cpu_s_per_gb", _plain),
    "servers' peak, MB": ("server_peak_mb", lambda row, name: str(row.get(name, ""))),
    "worker's peak, MB": ("worker_peak_mb", lambda row, name: str(row.get(name, ""))),
}
RATIO_COLUMNS = {"cycle / (memcpy + update)": "x_limit", "pull / limit": "x_pull"}
RATIO_COLUMNS |= {"push / limit": "x_push", "both / limit": "x_moved"}
HOST_COLUMNS: Mapping[str, tuple[str, Show]] = {
    "updates/s": ("updates_per_s", _cell),
    "pull, of the link": ("x_link_pull", _cell),
    "push, of the link": ("x_link_push", _cell),
    "pull / plain sockets": ("x_plain_pull", _plain),
    "push / plain sockets": ("x_plain_push", _plain),
    "updates/s / float32": ("x_float32", _cell),
    "server CPU s/GB": ("server_cpu_s_per_gb", _plain),
    "worker CPU s/GB": ("worker_cpu_s_per_gb", _plain),
}


def _markdown(
    rows: Iterable[Row], keys: Sequence[str], columns: Mapping[str, tuple[str, Show]]
) -> Iterator[str]:
    """A table; keys: figures that tell rows apart."""
    yield "| " + " | ".join((*keys, *columns)) + " |"
    yield "|" + "---|" * (len(keys) + len(columns))
    for row in rows:
        shown = (show(row, name) for name, show in columns.values())
        yield "| " + " | ".join((*(str(row.get(key, "")) for key in keys), *shown)) + " |"


def _memory_table(rows: Sequence[Row]) -> Iterator[str]:
    names = ("memcpy", "fused update")
    found = (row for row in rows if row["what"] in names)
    columns = {"ms": ("cycle_ms", _cell), "GB/s of one vector": ("gbps", _plain)}
    yield from _markdown(found, ("what", "work", "lane"), columns)


def sections(rows: Sequence[Row]) -> Iterator[str]:
    """All tables, as lines of markdown."""
    here = [row for row in rows if "hosts" not in row]
    loops = [row for row in here if "updates_per_s" in row]
    ratios = {title: (name, _cell) for title, name in RATIO_COLUMNS.items()}
    yield from ("### Bars", "", *table(verdicts(here)), "")
    yield from ("### Loops", "")
    yield from (*_markdown(loops, ("what", "work", "workers", "shards"), LANE_COLUMNS), "")
    yield from ("### Ratios to limits, within a round", "")
    limited = [row for row in loops if any(name in row for name in RATIO_COLUMNS.values())]
    yield from (*_markdown(limited, ("what", "work", "workers", "shards"), ratios), "")
    yield from ("### Memory, one thread", "", *_memory_table(here), "")
    between = [row for row in rows if row.get("hosts") == 2]
    if between:
        yield from ("### Two hosts", "")
        yield from (*_markdown(between, ("link_gbit", "what", "wire"), HOST_COLUMNS), "")
    for row in rows:
        if "skipped" in row:
            yield from (f"{row['what']} was skipped: {row['skipped']}.", "")


def replace_results(text: str, lines: Iterable[str]) -> str:
    """The text with other lines between the two comments."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join((before + BEGIN, "", *lines)) + END + after


@click.command(help=__doc__)
@click.argument("logs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Files' name, no end.")
def main(logs: Sequence[Path], out: Path) -> None:
    rows = [row for log in logs for row in rows_in(log.read_text().splitlines())]
    out.with_suffix(".jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    draw(cycles(rows), out.with_suffix(".svg"))
    page = out.with_suffix(".md")
    text = page.read_text() if page.is_file() else f"{BEGIN}\n{END}\n"
    page.write_text(replace_results(text, sections(rows)))


if __name__ == "__main__":
    main()
