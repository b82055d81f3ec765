"""A run's status as a page for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from asynception.console import duration, number
from asynception.totals import PHASES

NO_NEWS_S: Final = 20.0
"""A run that goes on and has published nothing for so long may have lost its trainer."""

NOTABLE_WAIT_S: Final = 1.0
"""For a standby to carry out an operation, or to take an image in."""

MAX_ROWS: Final = 24
"""Workers, and shards, that are shown; of more, those that stand out."""


def page(status: Mapping[str, Any], now_s: float) -> Group:
    """The page of what `read_status` returns. now_s: the time of day."""
    parts: list[RenderableType] = [_headline(status, now_s)]
    if "samples" in status:
        parts += [_figures(status), _bottleneck(status)]
        parts += [_workers(status), _shards(status), _lost(status["lost_work"])]
    parts += [_saved(status, now_s), *_events(status)]
    return Group(*parts)


def _headline(status: Mapping[str, Any], now_s: float) -> Text:
    age_s = max(0.0, now_s - status["updated_at"])
    text = Text.assemble(
        (str(status["run"]), "bold"), f"  {status['status']}  {status['mode']}  on {status['host']}"
    )
    if status["status"] == "running":
        text.append(f"  as of {duration(age_s)} ago")
        if age_s > NO_NEWS_S:
            text.append(
                f"\nno news for {duration(age_s)}: process {status['pid']} on {status['host']} is "
                "gone, or hangs; --resume goes on from the last checkpoint",
                "bold red",
            )
    if status.get("error"):
        text.append(f"\n{status['error']}", "red")
    return text


def _figures(status: Mapping[str, Any]) -> Text:
    total = status["total_samples"]
    share = status["samples"] / total if total else 1.0
    left = f", {duration(_float(status['left_s']))} left" if status["status"] == "running" else ""
    stale = status["staleness"]
    return Text(
        f"{status['samples']:,}/{total:,} samples ({share:.1%}) in {duration(status['time_s'])}"
        f"{left}\n"
        f"{_number(status['samples_per_s'])} samples/s  loss {_number(status['loss'])}  "
        f"lr {_number(status['lr'])}  staleness {_number(stale['mean'])} "
        f"(p99 {_number(stale['p99'])}, max {_number(stale['max'])})  "
        f"workers {sum(each['alive'] for each in status['workers'])}/{status['num_workers']}  "
        f"over the last {duration(status['window_s'])}"
    )


def _bottleneck(status: Mapping[str, Any]) -> Text:
    found = status["diagnosis"]
    text = Text(f"\n{found['text']}", "bold")
    for note in found["notes"]:
        text.append(f"\n{note}", "not bold yellow")
    return text


def _workers(status: Mapping[str, Any]) -> Table:
    workers, stragglers = status["workers"], status["diagnosis"]["stragglers"]
    shown = _chosen(workers, lambda each: each["worker"] in stragglers or _is_silent(each))
    table = _table(
        "worker", "samples/s", "staleness", "max", *(f"{name} %" for name in PHASES), "silent s"
    )
    for each in shown:
        style = "yellow" if each["worker"] in stragglers else ""
        style = "red" if status["status"] == "running" and not each["alive"] else style
        table.add_row(
            str(each["worker"]),
            _number(each["samples_per_s"]),
            _number(each["staleness_mean"]),
            _number(each["staleness_max"]),
            *(_percent(each["shares"][name]) for name in PHASES),
            f"{each['silent_s']:.1f}" if each["silent_s"] is not None else "-",
            style=style,
        )
    _note_left_out(table, len(workers) - len(shown))
    return table


def _shards(status: Mapping[str, Any]) -> Table:
    shards = status["shards"]
    shown = _chosen(shards, _lacks_standby)
    replicated = any(each.get("standby") for each in shards)
    titles = ("shard", "version", "busy %", "queue", "pins", "buffers", "lanes")
    table = _table(*titles, *(["standby"] if replicated else []))
    for each in shown:
        alone = status["status"] == "running" and _lacks_standby(each)
        table.add_row(
            str(each["shard"]),
            f"{each['version']:,}",
            _percent(each["busy"]),
            f"{each['queue']:.2f}",
            str(each["pins"]),
            str(each["buffers"]),
            " ".join(f"{lane} {count}" for lane, count in sorted(each["lanes"].items())) or "-",
            *([_standby(each.get("standby"))] if replicated else []),
            style="yellow" if alone else "",
        )
    _note_left_out(table, len(shards) - len(shown))
    return table


def _lost(lost: Mapping[str, Any]) -> Text:
    receipts = "  ".join(f"{name} {count:,}" for name, count in sorted(lost["receipts"].items()))
    return Text(
        f"receipts  {receipts or '-'}\n"
        f"lost work  {lost['dropped']:,} receipts dropped, {lost['samples_lost']:,} samples left "
        f"out, {lost['corrupt_images']:,} images corrupt, {lost['samples_returned']:,} samples "
        f"handed out again, {lost['samples_twice']:,} trained on twice"
    )


def _saved(status: Mapping[str, Any], now_s: float) -> Text:
    text = Text()
    checkpoint, evaluation = status.get("checkpoint"), status.get("evaluation")
    if checkpoint:
        age = duration(max(0.0, now_s - checkpoint["at"]))
        text.append(f"checkpoint  {checkpoint['name']}, {age} ago, took {checkpoint['took_s']:.1f}")
        text.append(" s\n")
    else:
        text.append("checkpoint  none yet\n")
    if evaluation:
        values = "  ".join(f"{name} {_number(v)}" for name, v in evaluation["metrics"].items())
        text.append(f"evaluation  at {evaluation['samples']:,} samples: {values}")
    else:
        text.append("evaluation  none yet")
    return text


def _events(status: Mapping[str, Any]) -> list[Text]:
    return [Text(f"  {event['text']}", "dim") for event in status["events"]]


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), caption_justify="left")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _chosen(rows: Sequence[Any], stands_out: Any) -> list[Any]:
    if len(rows) <= MAX_ROWS:
        return list(rows)
    first = sorted(rows, key=lambda each: not stands_out(each))[:MAX_ROWS]
    return sorted(first, key=rows.index)


def _note_left_out(table: Table, count: int) -> None:
    if count:
        table.caption = f"and {count} more"


def _lacks_standby(shard: Mapping[str, Any]) -> bool:
    standby = shard.get("standby")
    return standby is not None and standby["state"] != "in_step"


def _standby(standby: Mapping[str, Any] | None) -> str:
    """How it is, and how far behind: not the operation that is under way anyhow."""
    if standby is None:
        return "-"
    said = str(standby["state"]).replace("_", " ")
    if standby["waiting_s"] >= NOTABLE_WAIT_S:
        said += f", {standby['num_behind']} behind for {standby['waiting_s']:.0f} s"
    return said


def _is_silent(worker: Mapping[str, Any]) -> bool:
    return worker["silent_s"] is None or worker["silent_s"] > NO_NEWS_S


def _float(value: float | None) -> float:
    return float("inf") if value is None else value


def _number(value: float | None) -> str:
    return number(_float(value))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"
