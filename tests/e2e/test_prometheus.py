"""A live run with a slow worker, scraped by a real Prometheus: every panel of the dashboard and
every alert gets an answer, and `asynception status` says what is wrong."""

import json
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
    pytest.mark.skipif(PROMETHEUS is None, reason="Debian's prometheus is not installed"),
    pytest.mark.skipif(not ray_exports(), reason="ray[default] is not installed"),
]


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
        assert self.process.poll() is None, self.output
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


def panels() -> dict[str, str]:
    dashboard = json.loads((GRAFANA / "dashboard.json").read_text())
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }


@pytest.fixture(scope="module")
def scraped(recipe, tmp_path_factory):
    """A run whose second worker is slow, and the Prometheus that scrapes it."""
    folder, port = tmp_path_factory.mktemp("scraped"), free_port()
    settings = {
        "monitoring.port": port,
        "scaling.slow_workers": "{1 = 8}",
        "training.samples": 10_000_000,
    }
    run = TrainRun(folder, recipe, settings, env=REPORTS_EACH_S)
    prometheus = Prometheus(folder / "prometheus", f"127.0.0.1:{port}")
    yield run, prometheus
    run.kill_all()
    prometheus.kill_all()


def test_every_panel_gets_data_and_the_slow_worker_is_named(scraped):
    run, prometheus = scraped
    run.wait_for_samples(1)
    missing = dict(panels())

    def all_drawn() -> bool:
        assert run.process.poll() is None, run.output
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
    rules = prometheus.ask("rules")["groups"][0]["rules"]
    assert {rule["health"] for rule in rules} == {"ok"}

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
