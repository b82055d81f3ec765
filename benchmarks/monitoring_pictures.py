"""Pictures of a live run for docs/monitoring.md: `status --watch`, and what the dashboard shows.

Trains the quickstart with a standby and three workers, one of them four times as slow, while a
Prometheus scrapes it. After --seconds, what a terminal shows of `asynception status RUN --watch`
becomes docs/status_watch.svg, and the dashboard's panels, their queries drawn from Prometheus,
become docs/monitoring_panels.png. Needs ray[default], Prometheus (`make prometheus`) and tmux:

    make .venv/ray-default/.installed prometheus
    export PATH=$PWD/.venv/debian/usr/bin:$PATH
    .venv/ray-default/bin/python benchmarks/monitoring_pictures.py
"""

import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console
from rich.text import Text

ROOT: Final = Path(__file__).resolve().parents[1]
GRAFANA: Final = ROOT / "deploy" / "grafana"
COLUMNS, ROWS = 112, 40
SCRAPE_S, RATE_S = 2, 20
TIMEOUT_S: Final = 120.0
REPORTS_EACH_S: Final = {"RAY_metrics_report_interval_ms": "2000"}  # 10 s unless set
SETTINGS: Final = (
    "--run.name=quickstart",
    "--scaling.num_workers=3",
    '--scaling.resources_per_worker={"CPU" = 0.5}',
    "--scaling.num_servers=2",
    "--scaling.replicas=1",
    "--scaling.slow_workers={2 = 4}",
    "--training.epochs=none",
    "--training.samples=200000",
    "--evaluation.every_epochs=1",
    "--checkpoint.every_s=30",
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def running(command: Sequence[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program, ended by SIGTERM behind the block."""
    with output.open("wb") as said:
        program = subprocess.Popen(
            command,
            env={**os.environ, **REPORTS_EACH_S},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        yield program
    finally:
        program.terminate()
        program.wait(TIMEOUT_S)


class Prometheus:
    """One that scrapes a port of this machine."""

    def __init__(self, folder: Path, target: int) -> None:
        folder.mkdir()
        self._address = f"127.0.0.1:{free_port()}"
        job = {"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
        config = {"global": {"scrape_interval": f"{SCRAPE_S}s"}, "scrape_configs": [job]}
        (folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML
        self.command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self._address}",
        ]

    def series(self, query: str, start_s: float, end_s: float) -> list[dict[str, Any]]:
        """Of a panel's query: `metric`, its labels, and `values`, pairs of time and value."""
        query = query.replace("$run", ".*").replace("$__rate_interval", f"{RATE_S}s")
        asked = {"query": query, "start": start_s, "end": end_s, "step": SCRAPE_S}
        url = f"http://{self._address}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found


def terminal(folder: Path, run: Path) -> str:
    """What a terminal shows of `status --watch` after some refreshes, with its colours."""
    tmux = ["tmux", "-S", str(folder / "tmux")]
    watch = [sys.executable, "-m", "asynception", "status", str(run), "--watch"]
    size = ["-x", str(COLUMNS), "-y", str(ROWS)]
    subprocess.run([*tmux, "new-session", "-d", *size, *watch], check=True)
    try:
        time.sleep(10.0)
        shown = subprocess.run(
            [*tmux, "capture-pane", "-e", "-p"], check=True, capture_output=True, text=True
        )
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    return shown.stdout.rstrip()


def as_svg(shown: str) -> str:
    """With fonts of the reader's own: rich would have them fetched from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(shown))
    svg = console.export_svg(title="asynception status runs/quickstart --watch")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def draw(prometheus: Prometheus, start_s: float, end_s: float, path: Path) -> None:
    """All panels of the dashboard; one without data says so."""
    panels = json.loads((GRAFANA / "dashboard.json").read_text())["panels"]
    figure, axes = pyplot.subplots(
        math.ceil(len(panels) / 3), 3, figsize=(15, 2.3 * len(panels) / 3), layout="constrained"
    )
    for panel, ax in zip(panels, axes.flat, strict=False):
        _panel(ax, panel, prometheus, start_s, end_s)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=60)
    few = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    few.save(path, optimize=True)


def _panel(
    ax: Axes, panel: Mapping[str, Any], prometheus: Prometheus, start_s: float, end_s: float
) -> None:
    ax.set_title(panel["title"], fontsize=10)
    ax.set_xlim(0, end_s - start_s)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3)
    count = 0
    for target in panel["targets"]:
        for series in prometheus.series(target["expr"], start_s, end_s):
            times, values = zip(*series["values"], strict=True)
            label = _legend(target.get("legendFormat", ""), series["metric"])
            ax.plot([t - start_s for t in times], [float(v) for v in values], lw=1, label=label)
            count += 1
    if not count:
        ax.text(0.5, 0.5, "no data", transform=ax.transAxes, ha="center")
    elif count <= 8:
        ax.legend(fontsize=7, loc="best", ncols=2 if count > 3 else 1)
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template)


def wait_for_run(run: Path, trainer: "subprocess.Popen[bytes]", said: Path) -> None:
    """Until it publishes what it does."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (run / "status.json").exists():
        if trainer.poll() is not None or time.monotonic() > deadline_s:
            raise click.ClickException(f"the run did not start: {said.read_text()}")
        time.sleep(0.5)


@click.command(help=__doc__)
@click.option("--seconds", default=240.0, show_default=True, help="Of training.")
@click.option("--out", default=ROOT / "docs", type=click.Path(path_type=Path))
def main(seconds: float, out: Path) -> None:
    missing = [tool for tool in ("prometheus", "tmux") if shutil.which(tool) is None]
    if missing:
        raise click.ClickException(f"no {' and no '.join(missing)}: see --help")
    with tempfile.TemporaryDirectory(prefix="pictures-") as name:
        folder, port = Path(name), free_port()
        run, said = folder / "runs" / "quickstart", folder / "train.log"
        train = [sys.executable, "-m", "asynception", "train", "recipes/quickstart.toml", *SETTINGS]
        places = [f"--run.storage_path={run.parent}", f"--monitoring.port={port}"]
        prometheus = Prometheus(folder / "prometheus", port)
        with (
            running([*train, *places], said) as trainer,
            running(prometheus.command, folder / "prometheus.log"),
        ):
            wait_for_run(run, trainer, said)
            start_s = time.time()
            time.sleep(seconds)
            shown = terminal(folder, run)
            (out / "status_watch.svg").write_text(as_svg(shown))
            draw(prometheus, start_s, time.time(), out / "monitoring_panels.png")
            click.echo(re.sub(r"\x1b\[[0-9;]*m", "", shown))


if __name__ == "__main__":
    main()
