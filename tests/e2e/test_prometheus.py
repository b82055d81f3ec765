"""A live run with a slow worker and a standby, scraped as Prometheus does it, and by a real one
where there is one: all that dashboard and alerts ask for is exported, every panel gets an answer,
and `asynception status` says what is wrong."""

import json
import re
import shutil
import signal
import socket
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner
from processes import RUN_TIMEOUT_S, Command, TrainRun, wait_for

from asynception.cli import main
from asynception.monitoring.settings import MonitoringSettings, check_packages
from model.errors import InputError

GRAFANA = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
PROMETHEUS = shutil.which("prometheus")
REPORTS_EACH_S = {"RAY_metrics_report_interval_ms": "1000"}  # 10 s unless set


def ray_exports() -> bool:
    try:
        check_packages(MonitoringSettings(port=8080))
    except InputError:
        return False
    return True


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not ray_exports(),
        reason="ray[default] is not installed; make test-long runs this apart, with it",
    ),
    pytest.mark.timeout(900),  # the first test waits for a run to start, and then for its metrics
]

UNCOUNTED = {
    f"ray_asynception_{name}_total"
    for name in ("samples_lost", "samples_returned", "images_corrupt", "pull_gate_seconds")
}
"""Not there before they first count, which they don't in this run."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Prometheus(Command):
    """Scrapes one address each second, with the alert rules loaded."""

    def __init__(self, folder: Path, target: str) -> None:
        folder.mkdir()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(GRAFANA / "alerts.yml")],
            "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML
        self.address = f"127.0.0.1:{free_port()}"
        super().__init__(
            folder,
            str(PROMETHEUS),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.address}",
        )
        wait_for(self._answers, RUN_TIMEOUT_S, "Prometheus")

    def _answers(self) -> bool:
        assert self.process.poll() is None, str(self.output)
        try:
            return bool(self.ask("status/runtimeinfo"))
        except OSError:
            return False

    def ask(self, what: str, **parameters: str) -> dict:
        query = urllib.parse.urlencode(parameters)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{self.address}/api/v1/{what}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[float]:
        """Of a query as panels have it, for all runs; NaN left out."""
        query = query.replace("$run", ".*").replace("$__rate_interval", "30s")
        answer = self.ask("query", query=query)
        values = [float(each["value"][1]) for each in answer["result"]]
        return [value for value in values if value == value]


def scrape(port: int) -> dict[str, dict[str, str]]:
    """Labels of one series of each name that Ray exports."""
    from prometheus_client.parser import text_string_to_metric_families

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {sample.name: sample.labels for family in families for sample in family.samples}


def asked_for() -> set[str]:
    """Series that the dashboard and the alerts name."""
    texts = [(GRAFANA / name).read_text() for name in ("dashboard.json", "alerts.yml")]
    return set(re.findall(r"\bray_asynception_\w+", "".join(texts)))


def panels() -> dict[str, str]:
    dashboard = json.loads((GRAFANA / "dashboard.json").read_text())
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }


@pytest.fixture(scope="module")
def exporting(recipe, tmp_path_factory):
    """A run whose second worker is slow, and the port at which its Ray exports metrics."""
    folder, port = tmp_path_factory.mktemp("scraped"), free_port()
    settings = {
        "monitoring.port": port,
        "scaling.slow_workers": "{1 = 8}",
        "scaling.replicas": 1,
        "training.samples": 10_000_000,
    }
    run = TrainRun(folder, recipe, settings, env=REPORTS_EACH_S)
    yield run, port
    run.kill_all()


@pytest.fixture(scope="module")
def prometheus(exporting, tmp_path_factory):
    """A real one that scrapes the run."""
    _, port = exporting
    folder = tmp_path_factory.mktemp("prometheus") / "prometheus"
    prometheus = Prometheus(folder, f"127.0.0.1:{port}")
    yield prometheus
    prometheus.kill_all()


def test_all_that_dashboard_and_alerts_ask_for_is_exported(exporting):
    run, port = exporting
    run.wait_for_samples(1)
    missing = asked_for() - UNCOUNTED

    def all_there() -> bool:
        assert run.process.poll() is None, str(run.output)
        try:
            series = scrape(port)
        except OSError:  # what exports is a process of its own, which may start later
            return False
        missing.difference_update(series)
        ours = [labels for name, labels in series.items() if "_asynception_" in name]
        return not missing and {labels["run"] for labels in ours} == {"RUN"}

    try:
        wait_for(all_there, RUN_TIMEOUT_S, "series")
    except TimeoutError:
        pytest.fail(f"not exported: {missing}")


@pytest.mark.skipif(PROMETHEUS is None, reason="Debian's prometheus is not installed")
def test_every_panel_gets_data(exporting, prometheus):
    run, _ = exporting
    missing = dict(panels())

    def all_drawn() -> bool:
        assert run.process.poll() is None, str(run.output)
        for name in list(missing):
            if prometheus.values(missing[name]):
                del missing[name]
        return not missing

    try:
        wait_for(all_drawn, RUN_TIMEOUT_S, "panels with data")
    except TimeoutError:
        pytest.fail(f"no data: {missing}")
    (samples,) = prometheus.values("sum(ray_asynception_samples_total)")
    assert 0 < samples <= run.metrics("train")[-1]["samples"] + 10_000
    assert prometheus.values("max(ray_asynception_standby_in_step)") == [1]
    rules = prometheus.ask("rules")["groups"][0]["rules"]
    assert {rule["health"] for rule in rules} == {"ok"}


def test_the_slow_worker_is_named(exporting):
    run, _ = exporting

    def slow_worker_is_named() -> bool:
        said = CliRunner().invoke(main, ["status", str(run.path)], catch_exceptions=False)
        return "running" in said.output and "worker 1 is a straggler" in said.output

    wait_for(slow_worker_is_named, RUN_TIMEOUT_S, "word of the straggler")
    run.signal_group(signal.SIGINT)
    assert run.wait().code == 130
    result = run.result()
    assert result["diagnosis"]["stragglers"] == [1]
    status = json.loads((run.path / "status.json").read_text())
    assert (status["status"], status["diagnosis"]) == ("interrupted", result["diagnosis"])
