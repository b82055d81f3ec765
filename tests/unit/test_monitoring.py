"""What a run publishes of itself: status.json and the page made of it, from made-up progress."""

import io
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from waiting import eventually

from asynception.cli import main
from asynception.monitoring.measured import Mark, Reading, Span
from asynception.monitoring.monitor import EVERY_S, WINDOW_S, Monitor
from asynception.monitoring.page import MAX_ROWS, NO_NEWS_S, page
from asynception.monitoring.status import progress_json
from asynception.monitoring.status_file import STATUS_FILE, read_status, write_status
from asynception.recipe import validate
from asynception.totals import PHASES, Progress, Totals
from model.errors import InputError
from ps.client import ShardUnavailable
from ps.messages import ShardStatus
from ps.schedule import Clocks

TOTAL, BATCH = 10_000, 10


def config(mode="async", num_workers=2, num_servers=2):
    return validate(
        {
            "data": {"train": "t", "val": "v"},
            "training": {"samples": TOTAL},
            "run": {"name": "trial"},
            "consistency": {"mode": mode},
            "scaling": {"num_workers": num_workers, "num_servers": num_servers},
        }
    )


class Shards:
    """Two shards, of which each describes itself as told."""

    def __init__(self):
        self.updates, self.apply_s, self.gate_s = 0, 0.0, 0.0
        self.replicas = None, None

    def describe(self):
        status = ShardStatus(
            Clocks(self.updates, 0), {}, 3, {"applied": self.updates}, self.apply_s,
            queue_s=self.apply_s / 2, gate_s=self.gate_s, num_pins=1,
        )  # fmt: skip
        return [replace(status, replica=replica) for replica in self.replicas]


class Run:
    """A monitor, its shards, and a clock to turn."""

    def __init__(self, folder: Path, **settings):
        self.now_s, self.shards = 0.0, Shards()
        self.folder, self.metrics = folder, Metrics()
        self.monitor = Monitor(
            folder, config(**settings), TOTAL, self.metrics, lambda: 1e9 + self.now_s
        )
        self.monitor.attend(self.shards)
        self.totals = Totals()
        self.progress()

    def push(self, worker, *, seconds=(0.0, 0.0, 1.0, 0.0), staleness=1):
        """One push of a worker, whose phases took so long."""
        self.totals.pushes += 1
        self.totals.worker_pushes[worker] += 1
        self.totals.worker_samples[worker] += BATCH
        for name, value in zip(PHASES, seconds, strict=True):
            self.totals.phases_s.update({name: value})
            self.totals.worker_phases_s.update({(worker, name): value})
        self.totals.worker_staleness[worker, staleness] += 1
        self.totals.staleness[staleness] += 1
        self.totals.outcomes["applied"] += 2
        self.totals.lanes["tcp"] += 2
        for shard in (0, 1):
            self.totals.shard_lanes[shard, "tcp"] += 1
        self.shards.updates += 1

    def progress(self, seconds=0.0, *, finished=False, alive=(0, 1)):
        self.now_s += seconds
        silent_s = {} if finished else dict.fromkeys(alive, 0.5)
        samples = self.totals.pushes * BATCH
        progress = Progress(samples, self.totals.copy(), silent_s, finished)
        self.monitor.progress(self.now_s, progress)
        asked = self.monitor._watch._asked
        if asked is not None:  # the answer comes by another thread
            eventually(asked[1].done)

    @property
    def status(self):
        return read_status(self.folder)


class Metrics:
    def __init__(self):
        self.spans, self.evaluations, self.checkpoints = [], [], []

    def span(self, span):
        self.spans.append(span)

    def evaluation(self, metrics):
        self.evaluations.append(metrics)

    def checkpoint(self, age_s, took_s):
        self.checkpoints.append((age_s, took_s))


def shown(status, now_s=1e9, width=120):
    text = io.StringIO()
    Console(file=text, width=width).print(page(status, now_s))
    return text.getvalue()


def test_a_live_run_is_published_with_its_workers_and_shards(tmp_path):
    run = Run(tmp_path)
    for _ in range(30):
        for _ in range(4):
            run.push(0, seconds=(0.1, 0.2, 0.15, 0.05))
        run.push(1, seconds=(0.1, 0.2, 1.65, 0.05), staleness=7)
        run.shards.apply_s += 0.2
        run.progress(2.0)
    status = run.status
    assert (status["status"], status["samples"]) == ("running", 30 * 5 * BATCH)
    slow = status["workers"][1]
    assert slow["samples_per_s"] == pytest.approx(BATCH / 2)
    assert slow["shares"] == pytest.approx(
        {"data": 0.05, "pull": 0.1, "compute": 0.825, "push": 0.025}
    )
    assert (slow["staleness_mean"], slow["alive"]) == (7, True)
    shard = status["shards"][1]
    assert shard["busy"] == pytest.approx(0.1, rel=0.1)
    assert shard["queue"] == pytest.approx(0.05, rel=0.1)
    assert (shard["pins"], shard["buffers"]) == (1, 3)
    assert shard["lanes"] == {"tcp": 30 * 5}
    assert status["diagnosis"]["stragglers"] == [1]
    text = shown(status)
    assert "worker 1 is a straggler" in text
    assert "network-bound" in text
    assert "no news" not in text
    assert "no news" not in shown(status, status["updated_at"] + NO_NEWS_S - 1)
    assert "no news for" in shown(status, status["updated_at"] + NO_NEWS_S + 1)


def test_speeds_are_of_the_last_minute_and_the_end_is_of_the_whole(tmp_path):
    run = Run(tmp_path)
    for _ in range(100):
        run.push(0, seconds=(1.0, 0, 0, 0))
        run.progress(2.0)
    assert run.status["diagnosis"]["bottleneck"] == "data"
    for _ in range(100):
        run.push(0, seconds=(0, 0, 1.0, 0))
        run.progress(2.0)
    assert WINDOW_S <= run.status["window_s"] <= WINDOW_S + EVERY_S
    assert run.status["diagnosis"]["bottleneck"] == "compute"
    run.shards.gate_s = 5.0
    run.progress(0.1, finished=True)
    found = run.monitor.conclude("finished")
    assert found.bottleneck == "data"
    assert found.shares["data"] == pytest.approx(0.5)
    status = run.status
    assert (status["status"], status["window_s"]) == ("finished", pytest.approx(400.1))
    assert status["shards"][0]["gate_s"] == 5.0, "the shards' last word is waited for"
    assert [each["alive"] for each in status["workers"]] == [False]


def test_a_run_of_long_steps_is_judged_by_all_of_them(tmp_path):
    run = Run(tmp_path)
    for _ in range(12):
        run.push(0, seconds=(0, 0, 25.0, 0))
        run.progress(25.0)
    assert run.status["window_s"] <= 3 * 25
    assert run.status["diagnosis"]["bottleneck"] == "compute"


def test_progress_between_two_states_is_not_published(tmp_path):
    run = Run(tmp_path)
    run.push(0)
    run.progress(EVERY_S / 2)
    assert run.status["samples"] == 0
    run.progress(EVERY_S)
    assert run.status["samples"] == BATCH
    assert [span.num_samples for span in run.metrics.spans] == [BATCH]


def test_what_is_exported_adds_up_to_the_whole(tmp_path):
    run = Run(tmp_path)
    for _ in range(7):
        run.push(0, seconds=(0.25, 0, 1.0, 0))
        run.progress(3.0)
    run.progress(0.5, finished=True)
    spans = run.metrics.spans
    assert sum(span.totals.pushes for span in spans) == 7
    assert sum(each.data_s for span in spans for each in span.workers) == 7 * 0.25
    last = [span.later.reading.shards[0].clocks.updates for span in spans]
    assert last == sorted(last)
    assert last[-1] == 7


def test_a_shards_seconds_are_those_between_two_answers():
    """Answers come when they come, not at the marks."""

    def mark(time_s, *readings):
        (asked_s, apply_s, queue_s, gate_s) = readings or (0.0, 0, 0, 0)
        status = ShardStatus(Clocks(9, 0), {}, 3, {}, apply_s, queue_s=queue_s, gate_s=gate_s)
        reading = Reading(asked_s, [status] if readings else ())
        return Mark(time_s, Progress(0, Totals()), reading)

    later = mark(20.0, 18.0, 6.0, 4.0, 3.0)
    (after_another,) = Span(mark(10.0, 8.0, 5.0, 2.0, 1.0), later).shards
    assert (after_another.busy, after_another.mean_queue, after_another.gate_s) == (0.1, 0.2, 2.0)
    (the_first,) = Span(mark(8.0), later).shards
    assert (the_first.busy, the_first.mean_queue, the_first.gate_s) == (0.6, 0.4, 3.0)


def test_new_servers_begin_to_count_anew(tmp_path):
    run = Run(tmp_path)
    for _ in range(20):
        run.push(0)
        run.shards.apply_s += 1.0
        run.progress(2.0)
    run.monitor.attend(None)
    run.shards = Shards()
    run.monitor.attend(run.shards)
    run.totals = Totals()  # the run fell back to its start
    run.progress(2.0)
    for _ in range(20):
        run.push(0)
        run.progress(2.0)
    (first, *_) = run.status["shards"]
    assert first["busy"] == 0
    assert run.status["pushes"] == 20
    run.monitor.conclude("finished")
    assert run.status["window_s"] == pytest.approx(40.0), "the end is of this session alone"


def test_a_shard_that_does_not_answer_holds_nothing_up(tmp_path):
    run = Run(tmp_path)

    def refuse():
        raise ShardUnavailable("it is gone")

    run.shards.describe = refuse
    for _ in range(3):
        run.push(0)
        run.progress(2.0)
    run.progress(1.0, finished=True)
    run.monitor.conclude("failed", "a server stopped")
    assert run.status["error"] == "a server stopped"
    assert "a server stopped" in shown(run.status)


def test_checkpoints_evaluations_and_events_are_in_the_status(tmp_path):
    run = Run(tmp_path)
    run.progress(4.0)
    assert run.metrics.checkpoints[-1] == (4.0, None), "since the run began"
    run.monitor.checkpoint("checkpoint-7", 1.5)
    run.monitor.evaluation(70, {"loss": 2.0}, {"loss": 3.0})
    for number in range(20):
        run.monitor.event(f"event {number}")
    run.progress(6.0)
    assert run.metrics.checkpoints[-1] == (6.0, 1.5)
    assert run.metrics.evaluations == [{"loss": 2.0}]
    text = shown(run.status, 1e9 + 70)
    assert "checkpoint-7, 0:01:06 ago, took 1.5 s" in text
    assert "at 70 samples: loss 2" in text
    assert "event 19" in text
    assert "event 1\n" not in text


def test_a_status_that_can_not_be_written_ends_no_run(tmp_path, caplog):
    run = Run(tmp_path)
    run.monitor._folder = tmp_path / "gone"
    for _ in range(3):
        run.progress(2.0)
    assert [r.message.count("status.json can't be written") for r in caplog.records] == [1]
    run.monitor._folder = tmp_path
    run.progress(2.0)
    assert run.status["time_s"] == 8.0


def test_figures_are_of_the_window_and_lost_work_of_the_whole_run(tmp_path):
    def mark(time_s, num_consumed, **counted):
        totals = Totals(**counted)
        return Mark(time_s, Progress(num_consumed, totals, {0: 0.5, 1: 3.0}))

    stale = {"worker_staleness": Counter({(0, 2): 1}), "staleness": Counter({2: 1})}
    before = {"outcomes": Counter({"applied": 40, "stale": 3}), "samples_returned": 6}
    earlier = mark(10.0, 1000, pushes=50, losses=50, loss_sum=500.0, **stale, **before)
    later = mark(
        20.0,
        3000,
        pushes=60,
        losses=60,
        loss_sum=530.0,
        outcomes=Counter({"applied": 50, "stale": 4, "not_finite": 3}),
        lost=Counter({"shard-1": 5, "shard-2": 6}),
        corrupt={"a", "b"},
        samples_returned=7,
        samples_twice=2,
        staleness=Counter({2: 2, 5: 1}),
        worker_staleness=Counter({(0, 2): 2, (0, 5): 1}),
    )
    values = progress_json(Span(earlier, later), config(), TOTAL)
    assert (values["samples_per_s"], values["left_s"]) == (200.0, (TOTAL - 3000) / 200)
    assert (values["pushes"], values["loss"], values["window_s"]) == (60, 3.0, 10.0)
    assert values["lost_work"] == {
        "receipts": {"applied": 50, "stale": 4, "not_finite": 3},
        "dropped": 7,
        "corrupt_images": 2,
        "samples_lost": 11,
        "samples_returned": 7,
        "samples_twice": 2,
    }
    first, silent = values["workers"]
    assert (first["staleness_mean"], first["staleness_max"]) == (3.5, 5)
    assert (silent["worker"], silent["alive"], silent["silent_s"]) == (1, True, 3.0)
    assert (silent["pushes"], silent["staleness_mean"]) == (0, None)
    still = progress_json(Span(later, mark(30.0, 3000)), config(), TOTAL)
    assert (still["samples_per_s"], still["left_s"]) == (0.0, None)


def test_whoever_reads_the_status_while_it_is_written_sees_the_last_one_whole(tmp_path):
    write_status(tmp_path, {"samples": 1})
    (tmp_path / "as-opened").hardlink_to(tmp_path / STATUS_FILE)
    write_status(tmp_path, {"samples": 2})
    assert json.loads((tmp_path / "as-opened").read_text()) == {"samples": 1}
    assert read_status(tmp_path) == {"samples": 2}


def test_many_workers_are_shown_by_those_that_stand_out(tmp_path):
    run = Run(tmp_path, num_workers=60)
    for _ in range(10):
        for worker in range(60):
            run.push(worker, seconds=(0, 0, 5.0 if worker == 57 else 1.0, 0))
        run.progress(2.0, alive=range(60))
    text = shown(run.status)
    assert "and 36 more" in text
    assert re.search(r"^ +57 ", text, re.M)
    assert MAX_ROWS == 24


def test_the_command_reads_the_folder_alone(tmp_path):
    run = Run(tmp_path)
    run.push(0)
    run.progress(2.0)
    run.monitor.conclude("finished")
    said = CliRunner().invoke(main, ["status", str(tmp_path), "--watch"], catch_exceptions=False)
    assert said.exit_code == 0
    assert "trial  finished" in said.output
    as_json = CliRunner().invoke(main, ["status", str(tmp_path), "--json"])
    assert json.loads(as_json.output) == run.status


def test_folders_without_a_status_are_named(tmp_path):
    with pytest.raises(InputError, match="name the folder of a run that has begun"):
        read_status(tmp_path)
    (tmp_path / STATUS_FILE).write_text("{")
    with pytest.raises(InputError, match="can't be read"):
        read_status(tmp_path)


counts = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50)), max_size=5)


@settings(deadline=None)
@given(counts, counts, st.booleans())
def test_any_two_marks_have_a_page(before, more, answered):
    def mark(time_s, of):
        totals = Totals(worker_pushes=Counter(dict(of)), worker_samples=Counter(dict(of)))
        totals.worker_phases_s.update(
            {(w, n): float(c) for w, c in dict(of).items() for n in PHASES}
        )
        reading = Reading(time_s, Shards().describe() if answered else ())
        return Mark(time_s, Progress(0, totals, {0: 0.1}), reading)

    span = Span(mark(1.0, before), mark(1.0, [*before, *more]))
    assert span.diagnosis(config()).text
    assert len(span.shards) == 2 * answered
