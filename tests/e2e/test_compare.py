"""Modes compared from the command line, and the report in a real browser."""

import html
import json
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from processes import PROGRAM, RUN_TIMEOUT_S, Command, read_result, wait_for

from asynception.compare.groups import differing, flat_settings
from asynception.recipe import load_config

pytestmark = pytest.mark.long

MODES = ("async", "sync")
SAMPLES = 2880
TIMEOUT_S = 2 * RUN_TIMEOUT_S
PHONE, DESKTOP = 360, 1200
COLOURS = ((0, 114, 178), (213, 94, 0))
"""Of the first two groups."""

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")


def compare(folder, recipe, *arguments, modes=MODES):
    settings = ["--evaluation.every_epochs", "0.5", "--checkpoint.every_epochs", "none"]
    command = (*PROGRAM, "compare", str(recipe), "--modes", ",".join(modes), "--seeds", "1")
    return Command(
        folder, *command, "--samples", str(SAMPLES), "--out", "out", *arguments, *settings
    )


@pytest.fixture(scope="module")
def compared(recipe, tmp_path_factory):
    """Both modes with one seed. Tests only read it, but for the one that runs it again."""
    folder = tmp_path_factory.mktemp("compared")
    outcome = compare(folder, recipe).wait(TIMEOUT_S)
    assert outcome.code == 0, str(outcome)
    return folder


def test_every_mode_is_trained_under_equal_conditions(compared):
    folders = [compared / "out" / "runs" / f"{mode}-seed0" for mode in MODES]
    results = [read_result(folder) for folder in folders]
    assert [result["mode"] for result in results] == list(MODES)
    assert all(result["status"] == "finished" for result in results)
    assert {result["samples"] for result in results} == {SAMPLES}
    keys = differing([flat_settings(load_config(folder)) for folder in folders])
    assert keys
    assert all(key.startswith("consistency.") for key in keys)


def test_the_report_is_there_and_says_what_was_found(compared):
    out = compared / "out"
    text = (out / "report.html").read_text()
    said = (compared / "stdout.txt").read_text()
    for mode in MODES:
        final = read_result(out / "runs" / f"{mode}-seed0")["eval"]["map@100"]
        assert f"{mode} {final:.3f}, 1 run" in said
        assert f"{mode} {final:.3f}, 1 run" in text
    assert {path.name for path in out.glob("*.csv")} == {
        "points.csv",
        "runs.csv",
        "summary.csv",
        "staleness.csv",
    }
    assert (out / "plots" / "metric-time.png").is_file()


def measured(folder, page, width):
    """What a browser makes of the page in a window of so many pixels: places and sizes."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"""<!doctype html>
<iframe id="frame" style="border: 0; width: {width}px; height: 900px"
 srcdoc="{html.escape(page.read_text())}"></iframe>
<pre id="found"></pre>
<script>
const frame = document.getElementById("frame");
frame.onload = () => {{
  const page = frame.contentDocument;
  const boxes = (name) => [...page.querySelectorAll(name)].map((element) => {{
    const box = element.getBoundingClientRect();
    return {{id: element.closest("[id]")?.id, left: box.left, right: box.right,
             width: box.width, height: box.height}};
  }});
  document.getElementById("found").textContent = JSON.stringify({{
    needed: page.documentElement.scrollWidth, shown: page.documentElement.clientWidth,
    svgs: boxes("figure > svg"), lines: boxes("#plot-metric-samples svg path[style*='#0072b2']"),
    scrolls: boxes("main > .scroll"), tables: boxes("main > .scroll > table"),
    cells: boxes("main > .scroll td"),
  }});
}};
</script>""")
    dom = browse(folder, "--dump-dom", "--virtual-time-budget=20000", wrapper.as_uri())
    found = re.search(r'<pre id="found">(.+?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


def browse(folder, *arguments):
    """What the browser says; it reaches no network and keeps nothing."""
    profile = f"--user-data-dir={folder / 'profile'}"
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", profile)
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    outcome = Command(folder, CHROMIUM, *options, offline, *arguments).wait(RUN_TIMEOUT_S)
    assert outcome.code == 0, str(outcome)
    return outcome.stdout


@needs_browser
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_browser_shows_plots_and_tables(compared, tmp_path, width):
    page = compared / "out" / "report.html"
    found = measured(tmp_path, page, width)
    assert found["needed"] <= found["shown"] <= width, "the page itself scrolls sideways"
    num_plots = len(list((compared / "out" / "plots").glob("*.svg")))
    assert len(found["svgs"]) == num_plots >= 4
    for box in found["svgs"]:
        assert box["width"] > 0.8 * min(width, 500), box
        assert box["height"] > 60, box
        assert box["left"] >= 0, box
        assert box["right"] <= found["shown"], box
    assert max(line["width"] for line in found["lines"]) > 20, "no curve of the first mode"
    assert {box["id"] for box in found["tables"]} >= {"table-results", "table-work", "table-runs"}
    for table, scroll in zip(found["tables"], found["scrolls"], strict=True):
        assert table["height"] > 40, table
        assert scroll["right"] <= found["shown"], "a table that is too wide scrolls by itself"
    assert all(cell["width"] > 0 and cell["height"] > 0 for cell in found["cells"])


@needs_browser
def test_the_curves_are_painted(compared, tmp_path):
    shot = tmp_path / "page.png"
    page = compared / "out" / "report.html"
    browse(tmp_path, "--window-size=1200,2400", f"--screenshot={shot}", page.as_uri())
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    for colour in COLOURS:
        assert (pixels == colour).all(-1).sum() > 200


def test_what_is_there_is_not_run_again(recipe, compared):
    results = [compared / "out" / "runs" / f"{mode}-seed0" / "result.json" for mode in MODES]
    before = [path.stat().st_mtime_ns for path in results]
    outcome = compare(compared, recipe).wait(TIMEOUT_S)
    assert outcome.code == 0, str(outcome)
    assert outcome.stdout.count("is there already") == 2
    assert [path.stat().st_mtime_ns for path in results] == before


def test_runs_that_fail_are_shown_with_their_error(recipe, tmp_path):
    missing = ("--data.train", "nowhere-*.tar")
    outcome = compare(tmp_path, recipe, *missing, modes=["sync"]).wait(TIMEOUT_S)
    assert outcome.code == 1, str(outcome)
    assert outcome.stderr.startswith("error: 1 of 1 runs failed, sync-seed0 with: ")
    assert len(outcome.stderr.splitlines()) == 1
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("failed: data.train") == 1


def test_an_interrupted_comparison_leaves_nothing_running(recipe, tmp_path):
    command = compare(tmp_path, recipe, "--training.samples", "1000000")
    run = tmp_path / "out" / "runs" / "async-seed0"
    wait_for((run / "config.toml").exists, RUN_TIMEOUT_S, "run")
    command.process.send_signal(signal.SIGTERM)
    outcome = command.wait()
    assert outcome.code == 128 + signal.SIGTERM, str(outcome)
    command.wait_until_gone()
    assert read_result(run)["status"] == "interrupted"
    assert not (tmp_path / "out" / "runs" / "sync-seed0").exists()
