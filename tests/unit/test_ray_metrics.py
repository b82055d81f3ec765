"""What is counted for Prometheus, and that the dashboard and the alerts ask for nothing else."""

import json
import re
import shutil
import subprocess
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from asynception.monitoring import ray_metrics
from asynception.monitoring.measured import Mark, Reading, Span
from asynception.monitoring.ray_metrics import RayMetrics
from asynception.totals import PHASES, Progress, Totals
from ps.layout import Layout, Range, ShardRanges
from ps.messages import ReplicaStatus, ShardStatus
from ps.schedule import Clocks
from ps.wire import WireSettings

GRAFANA = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
NAME = re.compile(r"\bray_asynception_(\w+)")


class Instrument:
    """In place of Ray's, for all three kinds: what was recorded, by name and tags."""

    recorded: ClassVar[Counter] = Counter()

    def __init__(self, name, description, boundaries=(), tag_keys=()):
        assert description
        self._name, self._keys = name.removeprefix("asynception_"), set(tag_keys)

    def _key(self, tags):
        assert set(tags) == self._keys, f"{self._name}: Ray wants all of its tags"
        assert tags.pop("run") == "trial"
        return (self._name, *sorted(tags.items()))

    def inc(self, value, tags):
        assert value > 0, "Ray refuses it"
        self.recorded[self._key(dict(tags))] += value

    def set(self, value, tags):
        self.recorded[self._key(dict(tags))] = value

    def observe(self, value, tags):
        self.recorded[(*self._key(dict(tags)), value)] += 1


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(Instrument, "recorded", Counter())
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(ray_metrics, kind, Instrument)
    return lambda name, **tags: Instrument.recorded[(name, *sorted(tags.items()))]


def totals(pushes):
    made = Totals(
        pushes=pushes, losses=pushes, loss_sum=2.0 * pushes, norm_sum=3.0 * pushes, lr=0.5
    )
    made.samples_returned = 5 * pushes
    made.lost.update({"shard-1": pushes, "shard-2": 2 * pushes})
    made.corrupt |= {f"key-{number}" for number in range(pushes // 2)}
    made.outcomes.update({"applied": 2 * pushes, "stale": 1})
    made.staleness.update({0: pushes, 7: 1})
    made.worker_pushes.update({1: pushes})
    made.worker_samples.update({1: 8 * pushes})
    made.worker_phases_s.update({(1, name): 0.5 * pushes for name in PHASES})
    made.shard_lanes.update({(0, "shm"): pushes, (1, "grpc"): pushes})
    return made


def mark(time_s, pushes, alive=(1,), read=True, replica=None):
    statuses = [
        ShardStatus(
            Clocks(100 + pushes, 0), {}, 3, {}, 0.1 * pushes, 0, 0, 0.2 * pushes, 0.3 * pushes, 2,
            replica,
        )
        for _ in range(2 * read)
    ]  # fmt: skip
    progress = Progress(8 * pushes, totals(pushes), dict.fromkeys(alive, 1.5))
    return Mark(time_s, progress, Reading(time_s, statuses))


def plan_of(num_servers, replicas=0):
    ranges = ShardRanges(Range(0, 1000), Range(0, 10), ())
    return SimpleNamespace(
        config=SimpleNamespace(
            run=SimpleNamespace(name="trial"),
            wire=WireSettings(pull="bfloat16"),
            scaling=SimpleNamespace(replicas=replicas),
        ),
        model=SimpleNamespace(layout=Layout((ranges,) * num_servers)),
        total_samples=800,
    )


def exported(*marks):
    metrics = RayMetrics(plan_of(2))
    for earlier, later in pairwise(marks):
        metrics.span(Span(earlier, later))
    return metrics


def test_counters_add_up_over_spans(recorded):
    exported(mark(0, 10), mark(2, 14), mark(4, 20), mark(6, 20))
    assert recorded("pushes", worker="1") == 10
    assert recorded("samples", worker="1") == 80
    assert recorded("receipts", outcome="applied") == 20
    assert recorded("worker_seconds", worker="1", phase="pull") == 5.0
    assert recorded("updates", shard="1") == 10
    assert recorded("apply_seconds", shard="0") == pytest.approx(1.0)
    assert recorded("push_queue_seconds", shard="0") == pytest.approx(2.0)
    assert recorded("pull_gate_seconds", shard="1") == pytest.approx(3.0)
    assert (recorded("samples_returned"), recorded("samples_lost")) == (50, 30)
    assert recorded("images_corrupt") == 5
    assert Instrument.recorded["staleness_versions", 0] == 10


def test_bytes_are_those_of_the_lane_and_the_dtype(recorded):
    exported(mark(0, 0), mark(2, 5))
    assert recorded("wire_bytes", shard="0", lane="shm", direction="pull") == 5 * (2000 + 40)
    assert recorded("wire_bytes", shard="1", lane="grpc", direction="push") == 5 * (4000 + 40)
    assert recorded("wire_bytes", shard="0", lane="grpc", direction="push") == 0


def test_gauges_say_how_it_is_now(recorded):
    metrics = exported(mark(0, 0, alive=(0, 1)), mark(2, 10), mark(4, 20, alive=(1,)))
    metrics.evaluation({"map@100": 0.25})
    metrics.checkpoint(9.0, None)
    assert recorded("checkpoint_age_seconds") == 9.0
    assert ("checkpoint_seconds",) not in Instrument.recorded
    metrics.checkpoint(1.0, 2.5)
    assert (recorded("checkpoint_age_seconds"), recorded("checkpoint_seconds")) == (1.0, 2.5)
    assert recorded("evaluation", measure="map@100") == 0.25
    assert (recorded("loss"), recorded("gradient_norm")) == (2.0, 3.0)
    assert recorded("learning_rate") == 0.5
    assert recorded("progress_ratio") == 0.2
    assert recorded("worker_up", worker="1") == 1
    assert recorded("worker_silent_seconds", worker="1") == 1.5
    assert recorded("version", shard="0") == 120
    assert (recorded("pins", shard="0"), recorded("buffers", shard="0")) == (2, 3)
    assert recorded("push_queue_length", shard="0") == pytest.approx(1.0)


def test_standbys_are_shown_where_there_are_any(recorded):
    exported(mark(0, 0), mark(2, 4))
    assert not [name for name, *_ in Instrument.recorded if "standby" in name]
    seeding = ReplicaStatus(3, "seeding", 8, 2.5, waited_s=4.0)
    exported(
        mark(0, 0, replica=ReplicaStatus(3, "in_step", waited_s=1.5)), mark(2, 4, replica=seeding)
    )
    assert recorded("push_standby_seconds", shard="0") == 2.5
    assert recorded("standby_in_step", shard="1") == 0
    assert recorded("standby_operations_behind", shard="1") == 8
    assert recorded("standby_waiting_seconds", shard="1") == 2.5
    exported(mark(2, 4), mark(4, 8, replica=ReplicaStatus(4, "in_step", 1, 0.25)))
    assert recorded("standby_in_step", shard="1") == 1
    assert recorded("standby_operations_behind", shard="1") == 1


@pytest.mark.parametrize("replicas", [0, 1])
def test_of_servers_that_are_gone_nothing_waits_any_more(recorded, replicas):
    seeding = ReplicaStatus(3, "seeding", 8, 2.5) if replicas else None
    metrics = exported(mark(0, 0, replica=seeding), mark(2, 4, replica=seeding))
    metrics.resized(plan_of(1, replicas))
    for name in ("push_queue_length", "pins", "buffers"):
        assert recorded(name, shard="1") == 0
        assert recorded(name, shard="0") > 0
    assert recorded("standby_in_step", shard="1") == replicas
    assert recorded("standby_operations_behind", shard="1") == 0
    assert recorded("standby_operations_behind", shard="0") == 8 * replicas


def test_servers_that_are_added_have_their_bytes_counted(recorded):
    metrics = exported()
    metrics.resized(plan_of(3))
    more = totals(5)
    more.shard_lanes = Counter({(2, "tcp"): 5})
    later = mark(2, 5)
    metrics.span(Span(mark(0, 0), Mark(2, Progress(40, more, {}), later.reading)))
    assert recorded("wire_bytes", shard="2", lane="tcp", direction="push") == 5 * (4000 + 40)


def test_a_worker_that_is_gone_is_down_and_shards_may_say_nothing_yet(recorded):
    exported(mark(0, 0, read=False), mark(2, 0, alive=(0, 1), read=False), mark(4, 4, alive=(1,)))
    assert recorded("worker_up", worker="0") == 0
    assert recorded("updates", shard="0") == 0, "the version it was found at is no update"


def known_names():
    counters = {f"{name}_total" for name in ray_metrics._COUNTERS}
    staleness = {f"staleness_versions_{part}" for part in ("bucket", "sum", "count")}
    return counters | set(ray_metrics._GAUGES) | staleness


def test_dashboard_and_alerts_ask_for_metrics_that_there_are():
    dashboard = json.loads((GRAFANA / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(asked) >= 20
    named = set(NAME.findall("\n".join(asked)))
    alerts = set(NAME.findall((GRAFANA / "alerts.yml").read_text()))
    assert named | alerts <= known_names()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


PROMTOOL = shutil.which("promtool")


@pytest.mark.long  # of `.ci/long`, which fetches it
@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_each_alert_fires_for_what_it_is_for_and_no_other():
    for arguments in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([PROMTOOL, *arguments], cwd=GRAFANA, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    rules = (GRAFANA / "alerts.yml").read_text()
    tested = (GRAFANA / "alerts_test.yml").read_text()
    for name in re.findall(r"- alert: (\w+)", rules):
        assert f'alertname="{name}"' in tested
