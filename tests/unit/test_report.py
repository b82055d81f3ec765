"""What a run shows and writes, on a fake clock and consoles that are strings."""

import io
import json
import math
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asynception.report import METRICS_FILE, TENSORBOARD_FOLDER, Reporter
from asynception.totals import PHASES, Progress, Totals

KEYS = {
    *("kind", "time_s", "samples", "pushes", "workers", "loss", "grad_norm", "lr"),
    *("samples_per_s", "staleness_mean", "staleness_p50", "staleness_p99", "staleness_max"),
    *("dropped", "corrupt", "lanes", "data_s", "pull_s", "compute_s", "push_s"),
}


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Run:
    """A reporter with a clock to turn, and what it wrote."""

    def __init__(self, folder: Path, *, terminal: bool = False, total=1000, every_s=10.0, **more):
        self.folder, self.clock, self.text = folder, FakeClock(), io.StringIO()
        console = Console(file=self.text, force_terminal=terminal, width=100)
        self.reporter = Reporter(
            folder, "trial", total, every_s, terminal=console, clock=self.clock, **more
        )

    def after(self, seconds: float, progress: Progress) -> None:
        self.clock.now_s += seconds
        self.reporter.progress(progress)

    def lines(self, kind: str) -> list[dict]:
        text = (self.folder / METRICS_FILE).read_text()
        assert text.endswith("\n")
        values = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
        return [each for each in values if each["kind"] == kind]

    def shown(self) -> list[str]:
        return [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in self.text.getvalue().split("\n")]


def progress(samples: int, pushes: int = 0, *, loss=2.0, stale=1, workers=2, **more) -> Progress:
    """As after `pushes` applied pushes at one shard, each of loss `loss` and staleness `stale`."""
    values = {
        "pushes": pushes,
        "losses": pushes,
        "loss_sum": pushes * loss,
        "norm_sum": pushes * 3.0,
        "lr": 0.5,
        "outcomes": Counter({"applied": pushes}) if pushes else Counter(),
        "staleness": Counter({stale: pushes}) if pushes else Counter(),
        "phases_s": Counter({name: (i + 1.0) * pushes for i, name in enumerate(PHASES)}),
    }
    return Progress(samples, Totals(**values | more), dict.fromkeys(range(workers), 0.0))


def curves(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / TENSORBOARD_FOLDER), {"histograms": 0})
    accumulator.Reload()
    return accumulator


def drawn(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_a_point_holds_what_came_since_the_point_before(tmp_path):
    run = Run(tmp_path)
    run.after(4, progress(100, 10))
    run.after(6, progress(200, 20))
    run.after(3, progress(230, 23))
    second = progress(
        400,
        30,
        loss_sum=20 * 2.0 + 10 * 1.0,
        norm_sum=20 * 3.0 + 10 * 7.0,
        lr=0.25,
        corrupt={"one", "two"},
        outcomes=Counter(applied=26, stale=3, not_finite=1),
        staleness=Counter({1: 20, 0: 2, 4: 3, 9: 1}),
        workers=3,
        lanes=Counter(shm=4, tcp=1),
    )
    run.after(7, second)
    run.reporter.close()
    first, then = run.lines("train")
    assert set(first) == set(then) == KEYS
    assert (first["time_s"], first["samples"], first["pushes"]) == (10, 200, 20)
    assert (first["samples_per_s"], first["loss"], first["staleness_mean"]) == (20, 2, 1)
    assert (then["time_s"], then["samples"], then["pushes"]) == (20, 400, 30)
    assert (then["samples_per_s"], then["loss"], then["grad_norm"], then["lr"]) == (20, 1, 7, 0.25)
    assert (then["staleness_mean"], then["staleness_max"]) == (pytest.approx(21 / 6), 9)
    assert (then["staleness_p50"], then["staleness_p99"]) == (4, 9)
    assert (then["dropped"], then["corrupt"], then["workers"]) == (4, 2, 3)
    assert (first["lanes"], then["lanes"]) == ({}, {"shm": 4, "tcp": 1})
    assert [event["text"] for event in run.lines("event")] == ["lanes in use: shm, tcp"]
    assert [then[f"{name}_s"] for name in PHASES] == pytest.approx([1, 2, 3, 4])


def test_points_come_at_their_interval_and_once_more_at_the_end(tmp_path):
    run = Run(tmp_path, every_s=2.0)
    for step in range(1, 20):
        run.after(0.5, progress(step, step))
    assert [point["time_s"] for point in run.lines("train")] == [2, 4, 6, 8]
    run.reporter.close()
    assert [point["samples"] for point in run.lines("train")] == [4, 8, 12, 16, 19]
    run.reporter.close()
    assert len(run.lines("train")) == 5


@pytest.mark.parametrize("samples", [0, 20])
def test_the_end_adds_no_point_without_progress(tmp_path, samples):
    with Run(tmp_path).reporter:
        pass
    run = Run(tmp_path)
    run.after(10, progress(samples, samples))
    run.after(1, progress(samples, samples))
    run.reporter.close()
    assert [point["samples"] for point in run.lines("train")] == [samples]


def test_what_is_not_known_is_null(tmp_path):
    run = Run(tmp_path)
    run.after(10, progress(0))
    diverged = progress(10, 10, losses=0, loss_sum=0.0, norm_sum=0.0, outcomes=Counter(stale=10))
    diverged.totals.staleness.clear()
    run.after(10, diverged)
    run.reporter.evaluation(10, 10, {"map": math.nan, "loss": math.inf}, {"map": 0.5})
    run.reporter.close()
    idle, dropping = run.lines("train")
    unknown = {key for key, value in idle.items() if value is None}
    assert unknown == KEYS - {
        *("kind", "time_s", "samples", "pushes", "workers", "samples_per_s"),
        *("dropped", "corrupt", "lanes"),
    }
    assert idle["samples_per_s"] == 0
    assert dropping["loss"] is dropping["staleness_max"] is None
    assert dropping["dropped"] == 10
    (evaluation,) = run.lines("eval")
    assert evaluation["metrics"] == {"map": None, "loss": None}
    tags = curves(tmp_path).Tags()["scalars"]
    assert "train/lr" in tags
    assert "train/loss" not in tags
    assert "loss -" in run.shown()[0]


def test_curves_have_samples_as_steps(tmp_path):
    run = Run(tmp_path)
    run.after(10, progress(200, 20))
    run.after(10, progress(400, 30, loss_sum=50.0))
    run.reporter.evaluation(390, 29, {"map@100": 0.25, "loss": 3.0}, {})
    run.reporter.close()
    accumulator = curves(tmp_path)
    assert drawn(accumulator, "train/loss") == [(200, 2), (400, 1)]
    assert drawn(accumulator, "train/lr") == [(200, 0.5), (400, 0.5)]
    assert drawn(accumulator, "train/samples_per_s") == [(200, 20), (400, 20)]
    assert drawn(accumulator, "train/staleness_mean") == [(200, 1), (400, 1)]
    assert drawn(accumulator, "train/grad_norm") == [(200, 3), (400, 3)]
    assert drawn(accumulator, "eval/map@100") == [(390, 0.25)]
    shares = [drawn(accumulator, f"time/{name}_share")[0][1] for name in PHASES]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4])


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.integers(0, 60), st.integers(1, 9), min_size=1))
def test_the_histogram_of_staleness_is_exact(tmp_path_factory, counts):
    folder = tmp_path_factory.mktemp("run")
    run = Run(folder)
    run.after(10, progress(5, 5, staleness=Counter(counts)))
    run.reporter.close()
    (event,) = curves(folder).Histograms("train/staleness")
    histogram = event.histogram_value
    values = list(Counter(counts).elements())
    assert (histogram.min, histogram.max) == (min(values), max(values))
    assert (histogram.num, histogram.sum) == (len(values), sum(values))
    assert histogram.sum_squares == sum(value**2 for value in values)
    low = -math.inf
    in_bucket = {}
    for high, count in zip(histogram.bucket_limit, histogram.bucket, strict=True):
        assert high - low == 1 if count else low < high
        assert count == sum(low < value <= high for value in values)
        in_bucket |= {high - 0.5: count} if count else {}
        low = high
    assert in_bucket == counts


def test_plain_lines_without_a_terminal(tmp_path):
    run = Run(tmp_path)
    run.reporter.event("worker 1 died [/bold] :smile: " + "x" * 200)
    run.after(10, progress(200, 20, outcomes=Counter(applied=18, stale=2)))
    run.reporter.evaluation(200, 20, {"map": 0.25, "other": 1.0}, {"map": 0.125})
    run.reporter.close()
    assert "\x1b" not in run.text.getvalue()
    event, point, evaluation, rest = run.shown()
    assert event == "worker 1 died [/bold] :smile: " + "x" * 200
    assert point == (
        "200/1,000 samples (20.0%)  0:00:40 left  20 samples/s  loss 2  lr 0.5  "
        "staleness 1 (max 1)  workers 2  dropped 2"
    )
    assert evaluation == "evaluation at 200 samples: map 0.25 (baseline 0.125), other 1"
    assert rest == ""
    stamp = r"\d\d:\d\d:\d\d  "
    assert all(re.match(stamp, line) for line in run.text.getvalue().splitlines())
    assert [each["text"] for each in run.lines("event")] == [event]


def test_a_live_bar_on_a_terminal(tmp_path):
    run = Run(tmp_path, terminal=True)
    run.after(2, progress(200, 20))
    run.reporter.event("worker 1 died")
    run.after(2, progress(400, 40))
    with_bar = run.text.getvalue()
    run.after(6, progress(1000, 100))
    run.reporter.close()
    assert "trial" in with_bar
    assert "400/1,000 samples (40.0%)  0:00:06 left" in with_bar
    assert "100 samples/s  loss 2" in with_bar
    assert "worker 1 died" in with_bar
    assert "\x1b[?25l" in with_bar, "the cursor is hidden"
    whole = run.text.getvalue()
    assert whole.index("\x1b[?25l") < whole.rindex("\x1b[?25h"), "and shown again at the end"
    assert whole.count("1,000/1,000 samples (100.0%)  0:00:00 left") >= 1
    assert len(run.lines("train")) == 1
    assert not re.search(r"\d\d:\d\d:\d\d  [^\n]*samples/s", whole), "the bar says it already"
    # The line above the bar stays: it is not among what later frames erase and draw again.
    assert whole.count("worker 1 died") == 1


def test_a_new_point_does_not_make_the_bar_jump(tmp_path):
    run = Run(tmp_path, terminal=True)
    run.after(10, progress(200, 20))
    run.after(10, progress(500, 50))
    run.after(1, progress(500, 50))
    shown = re.findall(r"(\S+) samples/s  loss (\S+)", run.text.getvalue())
    assert [rate.rpartition("m")[2] for rate, _ in shown] == ["20", "30", "27.27"]
    assert [loss for _, loss in shown] == ["2", "2", "2"]


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    run = Run(tmp_path, terminal=True)
    run.after(10, progress(200, 20))
    run.reporter.close()
    assert run.shown()[0].startswith("200/1,000 samples (20.0%)")


def test_time_left_follows_the_recent_rate(tmp_path):
    run = Run(tmp_path, every_s=10.0)
    run.after(10, progress(100, 10))
    run.after(10, progress(500, 50))
    run.after(10, progress(500, 50))
    lefts = [re.search(r"(\S+) left", line)[1] for line in run.shown()[:3]]
    assert lefts == ["0:01:30", "0:00:12", "?"]


def test_a_resumed_run_appends_and_counts_on(tmp_path):
    run = Run(tmp_path)
    run.after(10, progress(200, 20))
    run.after(10, progress(300, 30))
    run.reporter.evaluation(200, 20, {"map": 0.5}, {})
    run.reporter.close()
    earlier = (tmp_path / METRICS_FILE).read_bytes()

    again = Run(tmp_path, start_samples=200, started_s=10.0)
    again.after(5, progress(200, 20))
    again.after(2, progress(240, 24))
    again.after(8, progress(300, 30, loss_sum=45.0))
    again.reporter.close()
    assert (tmp_path / METRICS_FILE).read_bytes().startswith(earlier)
    point = again.lines("train")[-1]
    assert (point["time_s"], point["samples"], point["pushes"]) == (25, 300, 30)
    assert (point["samples_per_s"], point["loss"]) == (10, 0.5)
    accumulator = curves(tmp_path)
    assert drawn(accumulator, "train/loss") == [(200, 2), (300, 0.5)]
    assert drawn(accumulator, "eval/map") == [(200, 0.5)]


@pytest.mark.parametrize("start", [0, 100])
def test_a_run_that_falls_back_goes_on_from_there(tmp_path, start):
    run = Run(tmp_path)
    run.after(10, progress(100, 10))
    run.after(10, progress(500, 50))
    run.after(10, progress(start, start // 10))
    run.after(10, progress(start + 50, start // 10 + 5, loss_sum=start / 5 + 5))
    run.reporter.close()
    points = run.lines("train")
    assert [point["samples"] for point in points] == [100, 500, start + 50]
    assert (points[-1]["samples_per_s"], points[-1]["loss"]) == (5, 1)
    kept = [(100, 2.0)] if start else []
    assert drawn(curves(tmp_path), "train/loss") == [*kept, (start + 50, 1)]


def test_a_fall_back_shows_in_pushes_even_if_samples_have_caught_up(tmp_path):
    run = Run(tmp_path)
    run.after(10, progress(100, 10))
    run.after(10, progress(110, 4))
    run.after(10, progress(150, 6, loss_sum=10.0))
    run.reporter.close()
    first, then = run.lines("train")
    assert (first["pushes"], then["pushes"]) == (10, 6)
    assert (then["loss"], then["samples_per_s"]) == (1, 4)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 400))
def test_a_line_cut_short_by_a_kill_spoils_no_other(tmp_path_factory, num_bytes):
    folder = tmp_path_factory.mktemp("run")
    run = Run(folder)
    run.reporter.event("first")
    run.after(10, progress(200, 20))
    run.reporter.close()
    path = folder / METRICS_FILE
    written = path.read_bytes()
    path.write_bytes(written[:num_bytes])
    again = Run(folder)
    again.reporter.event("second")
    again.reporter.close()
    whole = path.read_bytes()
    assert whole.startswith(written[:num_bytes])
    assert json.loads(whole.splitlines()[-1])["text"] == "second"
    complete = written[:num_bytes].count(b"\n")
    assert whole.splitlines()[:complete] == written.splitlines()[:complete]


def test_lines_are_on_disk_at_once_and_survive_an_error(tmp_path):
    run = Run(tmp_path, terminal=True)
    with suppress(KeyError), run.reporter:
        run.reporter.event("begun")
        assert run.lines("event")[0]["samples"] == 0
        run.after(3, progress(30, 3))
        raise KeyError
    assert [point["samples"] for point in run.lines("train")] == [30]
    assert run.text.getvalue().rstrip("\n").endswith("\x1b[?25h")
    assert drawn(curves(tmp_path), "train/loss") == [(30, 2)]


def test_stdout_is_the_default(tmp_path, capsys):
    with Reporter(tmp_path, "trial", 10, 1.0) as reporter:
        reporter.event("hello")
    assert capsys.readouterr().out.endswith("  hello\n")
