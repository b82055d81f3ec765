"""The page, the words and the tables of a comparison of runs that are there already."""

import csv
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from compared_runs import write_run

from asynception.compare.attempts import Attempt
from asynception.compare.command import compare
from asynception.compare.groups import group_runs
from asynception.compare.reading import RunRecord
from asynception.compare.report import write_report
from asynception.compare.scaling import efficiencies
from asynception.compare.summary import default_target, summarize
from asynception.compare.traffic import num_bytes_moved, num_exchange_bytes
from asynception.compare.words import describe, reservations
from asynception.plan import plan_model
from model.errors import InputError


class Elements(HTMLParser):
    """Counts elements, and notes what would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.counts, self.fetched, self.ids = {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attrs:
            is_link = name in ("src", "href", "xlink:href", "srcset", "data", "action")
            if is_link and not value.startswith("#"):
                self.fetched.append(value)
            if name == "id":
                self.ids.append(value)


def runs_of(folder, values, **kwargs):
    """Runs by mode, one for each of its final values."""
    return [
        write_run(
            folder / f"{mode}-{seed}",
            mode=mode,
            seed=seed,
            curve=[(32, value / 2), (64, value)],
            **kwargs,
        )
        for mode, finals in values.items()
        for seed, value in enumerate(finals)
    ]


def words_of(folder, values):
    summaries = summarize(group_runs(runs_of(folder, values)), None)
    return describe(summaries, "map@100")


def sentence(sentences, start):
    (found,) = [each for each in sentences if each.startswith(start)]
    return found


def test_overlapping_ranges_show_no_difference(tmp_path):
    said = words_of(tmp_path, {"async": [0.5, 0.6, 0.7], "sync": [0.6, 0.7, 0.8]})
    told = sentence(said, "map@100 of sync")
    assert "0.100 higher" in told
    assert "no difference is shown" in told


def test_ranges_apart_are_told_with_the_odds_of_chance(tmp_path):
    said = words_of(tmp_path, {"async": [0.5, 0.6, 0.7], "sync": [0.2, 0.3, 0.4]})
    told = sentence(said, "map@100 of sync")
    assert "0.300 lower" in told
    assert "in each of these runs" in told
    assert "10.0 %" in told


def test_two_runs_each_are_a_hint_at_most(tmp_path):
    told = sentence(
        words_of(tmp_path, {"async": [0.5, 0.6], "sync": [0.7, 0.8]}), "map@100 of sync"
    )
    assert "a hint at most" in told
    assert "33.3 %" in told


def test_a_single_run_has_no_spread(tmp_path):
    said = words_of(tmp_path, {"async": [0.5], "sync": [0.9]})
    assert any("A single run has no spread" in each for each in said)
    assert not any("higher than" in each for each in said)


def test_equal_means_are_called_the_same(tmp_path):
    told = sentence(
        words_of(tmp_path, {"async": [0.5, 0.7], "sync": [0.6, 0.6]}), "map@100 of sync"
    )
    assert "the same as" in told


def test_runs_that_did_not_finish_are_told_and_left_out(tmp_path):
    runs = runs_of(tmp_path, {"async": [0.5, 0.6], "sync": [0.5]})
    failed = write_run(
        tmp_path / "failed", mode="sync", seed=7, status="failed", error="it diverged"
    )
    summaries = summarize(group_runs([*runs, failed]), None)
    assert describe(summaries, "map@100")[0].startswith("1 of 2 runs of sync did not finish")
    assert summaries[1].final.num_runs == 1


def test_what_bears_on_speed_is_told(tmp_path):
    settings = {"scaling": {"slow_workers": {"1": 20}}}
    machine = {"cores": 2, "packages": {}}
    runs = [
        replace(
            write_run(tmp_path / mode, mode=mode, settings=settings),
            attempt=Attempt("", 1.0, 0, None, load, machine),
        )
        for mode, load in (("async", 0.5), ("sync", 7.0))
    ]
    said = reservations(summarize(group_runs(runs), None))
    (slow,) = [each for each in said if "slow on purpose" in each]
    assert slow.startswith("In the runs of async and sync,")
    assert "(1x20: worker x factor)" in slow
    (busy,) = [each for each in said if "more to do" in each]
    assert busy.startswith("Before 1 of 2 runs")
    assert "load up to 7" in busy


def test_a_level_that_some_runs_missed_is_not_compared(tmp_path):
    runs = runs_of(tmp_path, {"async": [0.8, 0.8], "sync": [0.4, 0.8, 0.9]})
    said = describe(summarize(group_runs(runs), 0.6), "map@100")
    assert any(each.startswith("2 of 3 runs of sync reached map@100 0.6") for each in said)
    assert not any(each.startswith("Time to map@100 0.6 of sync") for each in said)


def test_the_default_level_is_what_every_groups_mean_reached(tmp_path):
    runs = runs_of(tmp_path, {"async": [0.5, 0.7], "sync": [0.8, 0.9]})
    groups = group_runs(runs)
    assert default_target(groups) == pytest.approx(0.6, abs=0.0101)
    assert all(each.target.of_mean is not None for each in summarize(groups, None))
    assert default_target(group_runs(runs[:0])) is None


def test_time_to_a_level_is_of_training(tmp_path):
    (run,) = runs_of(tmp_path, {"async": [0.8]}, step_s=2.0, began_s=33.0)
    (summary,) = summarize(group_runs([run]), 0.6)
    # 0.4 after 8 s, 0.8 after 16 s.
    assert summary.target.of_mean.x == pytest.approx(12.0)


def test_efficiency_is_speed_per_worker_among_groups_of_one_kind(tmp_path):
    runs = [
        write_run(
            tmp_path / f"{mode}-{count}",
            mode=mode,
            step_s=1 / math.sqrt(count),
            settings={"scaling": {"num_workers": count}},
        )
        for mode in ("async", "sync")
        for count in (4, 1)
    ]
    found = efficiencies(summarize(group_runs(runs), None))
    assert len(found) == 2
    assert all(each.speedup == pytest.approx(2) for each in found)
    assert all(each.efficiency == pytest.approx(0.5) for each in found)
    assert all(each.summary.group.mode == each.base.group.mode for each in found)
    assert efficiencies(summarize(group_runs(runs[::2]), None)) == []


def test_bytes_are_those_of_a_pull_and_a_push_for_every_push(tmp_path, monkeypatch):
    servers = {"scaling": {"num_servers": 2}}
    run = write_run(tmp_path / "run", receipts={"applied": 10, "stale": 4}, settings=servers)
    assert num_exchange_bytes(run) is None  # without a checkpoint, the model isn't known
    monkeypatch.setattr("asynception.compare.traffic._extra", lambda _: {"num_classes": 5})
    size = num_exchange_bytes(run)
    plan = plan_model(run.config, 5)
    assert size == plan.pull_num_bytes + plan.push_num_bytes > 8 * plan.num_parameters
    assert num_bytes_moved(run, size) == 7 * size
    assert num_bytes_moved(RunRecord(run.path, run.config), size) is None


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    stale = {"mean": 0.8, "p50": 1.0, "p99": 2.0, "max": 3.0}
    runs = runs_of(folder, {"async": [0.5, 0.6], "sync": [0.7, 0.8]}, staleness=stale)
    runs.append(
        write_run(
            folder / "failed", seed=9, status="failed", error="<b>bad</b> & worse", receipts={}
        )
    )
    write_report(runs, folder / "out", None, "A <title> & more")
    return folder / "out"


def test_the_page_is_one_file_that_fetches_nothing(out):
    text = (out / "report.html").read_text()
    elements = Elements(text)
    assert elements.fetched == []
    assert not {"script", "link", "img", "iframe", "object"} & set(elements.counts)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_has_all_plots_and_tables_with_ids_of_their_own(out):
    elements = Elements((out / "report.html").read_text())
    names = {path.stem for path in (out / "plots").glob("*.svg")}
    assert names >= {"metric-samples", "metric-updates", "metric-time", "speed", "time-to-target"}
    assert names == {path.stem for path in (out / "plots").glob("*.png")}
    assert elements.counts["svg"] == len(names)
    assert {f"plot-{name}" for name in names} <= set(elements.ids)
    tables = ("results", "target", "work", "phases", "runs", "different", "common")
    assert {f"table-{name}" for name in tables} <= set(elements.ids)
    assert len(set(elements.ids)) == len(elements.ids)


def test_text_is_escaped(out):
    text = (out / "report.html").read_text()
    assert "&lt;b&gt;bad&lt;/b&gt; &amp; worse" in text
    assert "A &lt;title&gt; &amp; more" in text
    assert "<b>bad" not in text


def test_drawings_take_the_colour_of_the_text(out):
    text = (out / "report.html").read_text()
    assert "currentColor" in text
    assert "#0a0b0c" not in text.lower()
    assert "#0a0b0c" in (out / "plots" / "metric-samples.svg").read_text().lower()


def test_the_tables_for_other_programs_hold_every_number(out):
    def rows(name):
        with (out / name).open(newline="") as file:
            return list(csv.DictReader(file))

    points = rows("points.csv")
    assert len(points) == 5 * 2
    assert {row["group"] for row in points} == {"async", "sync"}
    assert [float(row["map@100"]) for row in points[:2]] == [0.25, 0.5]
    runs = {row["run"]: row for row in rows("runs.csv")}
    assert runs["failed"]["error"] == "<b>bad</b> & worse"
    assert runs["failed"]["lost_share"] == ""
    assert float(runs["sync-1"]["eval_map@100"]) == 0.8
    summary = {row["group"]: row for row in rows("summary.csv")}
    assert (summary["async"]["runs"], summary["async"]["finished"]) == ("3", "2")
    assert float(summary["sync"]["final_mean"]) == pytest.approx(0.75)
    assert float(summary["sync"]["final_low"]) == 0.7


def test_measures_that_were_not_finite_leave_gaps(tmp_path):
    runs = runs_of(tmp_path, {"async": [0.5, 0.6]})
    lost = {"map@100": None, "loss": None}
    runs.append(write_run(tmp_path / "nan", mode="sync", eval=lost, baseline=lost))
    folder = runs[-1].path / "checkpoints" / "checkpoint-000000001"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{")
    write_report(runs, tmp_path / "out", None, "gaps")
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        finals = {row["group"]: row["final_mean"] for row in csv.DictReader(file)}
    assert finals == {"async": "0.55", "sync": ""}


def test_a_comparison_of_failed_runs_alone_is_a_page_all_the_same(tmp_path):
    runs = [
        write_run(tmp_path / mode, mode=mode, status="failed", error="no luck", receipts={})
        for mode in ("async", "sync")
    ]
    said = write_report(runs, tmp_path / "out", None, "failed")
    assert said[-1].startswith("No run finished")
    assert "no luck" in (tmp_path / "out" / "report.html").read_text()


def test_the_command_compares_runs_that_are_there(tmp_path):
    runs = runs_of(tmp_path, {"async": [0.5], "sync": [0.6]})
    out = tmp_path / "out"
    paths = [str(run.path) for run in runs]
    outcome = CliRunner().invoke(compare, [*paths, "--out", str(out)], catch_exceptions=False)
    assert outcome.exit_code == 0
    assert "map@100, mean and range over runs" in outcome.output
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["RUN", "--out", "o"], "name two or more"),
        (["RUN", "OTHER"], "--out is missing"),
        (["RUN", "OTHER", "--out", "o", "--seeds", "2"], "--seeds has no effect"),
        (["RUN", "OTHER", "--out", "o", "--data.batch_size", "2"], "--data.batch_size has no"),
        (["RUN", "nowhere", "--out", "o"], "nowhere is no run"),
        (["RUN", "OTHER", "--modes", "sync"], "needs one recipe"),
        (["RUN", "--modes", "sync", "--samples", "8", "--budget", "1m"], "give one of them"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, monkeypatch, arguments, says):
    runs = runs_of(tmp_path, {"async": [0.5], "sync": [0.6]})
    monkeypatch.chdir(tmp_path)
    named = {"RUN": str(runs[0].path), "OTHER": str(runs[1].path)}
    with pytest.raises(InputError, match=says):
        CliRunner().invoke(
            compare, [named.get(each, each) for each in arguments], catch_exceptions=False
        )
    assert not (tmp_path / "o").exists()
