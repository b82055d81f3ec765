"""Curves besides TensorBoard: what W&B and MLflow are sent, by stand-ins for their packages, and
that neither can harm a run."""

import math
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
from waiting import DEADLINE_S, eventually

from asynception.monitoring import loggers
from asynception.monitoring.loggers import MAX_PENDING, Aside, open_asides
from asynception.monitoring.settings import MonitoringSettings, check_packages
from asynception.recipe import validate
from model.errors import InputError


def config(**monitoring):
    return validate(
        {
            "data": {"train": "t", "val": "v"},
            "training": {"samples": 10},
            "run": {"name": "trial"},
            "monitoring": monitoring,
        }
    )


def draw(folder, made):
    """What one process of a run sends; returns what people are told."""
    told = []
    for logger in open_asides(folder, made, told.append):
        logger.scalars({"eval/map@100": 0.5, "train/loss": math.nan}, 10)
        logger.histogram("train/staleness", {1: 3, 3: 2}, 10)
        logger.rewind(5)
        logger.scalars({"eval/map@100": 0.25}, 5)
        logger.close()
    return told


def stand_in(monkeypatch, **modules):
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name.replace("_", "."), module)


def test_wandb_gets_points_over_samples_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    logged, begun = [], []

    def init(**options):
        begun.append(options)
        return SimpleNamespace(
            id="abc",
            define_metric=lambda *name, step_metric: logged.append((name, step_metric)),
            log=logged.append,
            finish=lambda: logged.append("finished"),
        )

    stand_in(
        monkeypatch,
        wandb={
            "init": init,
            "Histogram": lambda np_histogram: np_histogram,
            "Settings": lambda silent: None,
        },
    )
    made = config(wandb_project="pictures")
    assert draw(tmp_path, made) == []
    assert logged == [
        (("*",), "samples"),
        {"eval/map@100": 0.5, "samples": 10},
        {"train/staleness": ([3, 0, 2], [0.5, 1.5, 2.5, 3.5]), "samples": 10},
        {"eval/map@100": 0.25, "samples": 5},
        "finished",
    ]
    draw(tmp_path, made)
    assert [each["id"] for each in begun] == [None, "abc"]
    assert (begun[0]["project"], begun[0]["name"]) == ("pictures", "trial")
    assert begun[0]["config"]["training"]["samples"] == 10


class Client:
    """MLflow's, with a store in memory."""

    runs: dict  # set by the test

    def __init__(self, tracking_uri):
        assert tracking_uri == "http://there"

    def get_experiment_by_name(self, name):
        assert name == "asynception"

    def create_experiment(self, name):
        return "7"

    def create_run(self, experiment_id, run_name):
        assert (experiment_id, run_name) == ("7", "trial")
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = {"params": {}, "metrics": [], "status": "RUNNING"}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id, status):
        self.runs[run_id]["status"] = status

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100
        self.runs[run_id]["params"].update(params)
        self.runs[run_id]["metrics"] += [(name, value, step) for name, value, _, step in metrics]

    def set_terminated(self, run_id):
        self.runs[run_id]["status"] = "FINISHED"


def test_mlflow_gets_points_and_settings_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Client, "runs", {}, raising=False)
    stand_in(
        monkeypatch,
        mlflow={},
        mlflow_entities={"Metric": lambda *each: each, "Param": lambda *each: each},
        mlflow_tracking={"MlflowClient": Client},
    )
    made = config(mlflow_uri="http://there")
    assert draw(tmp_path, made) == []
    (run,) = Client.runs.values()
    assert run["metrics"] == [("eval/map_at_100", 0.5, 10), ("eval/map_at_100", 0.25, 5)]
    assert run["params"]["training.samples"] == "10"
    assert run["status"] == "FINISHED"
    draw(tmp_path, made)
    assert list(Client.runs) == ["run0"]
    assert len(run["metrics"]) == 4


class Broken:
    """Refuses what it is sent."""

    def __init__(self):
        self.calls = 0

    def scalars(self, values, samples):
        self.calls += 1
        raise RuntimeError("no\nroute")

    def close(self):
        self.calls += 1


def test_a_service_that_fails_is_told_of_once_and_left_alone():
    told, broken = [], Broken()
    logger = Aside("W&B", lambda: broken, told.append)
    logger.scalars({}, 1)
    eventually(lambda: broken.calls == 1)
    eventually(logger._pending[0].done)
    for _ in range(3):
        logger.scalars({}, 1)
    logger.close()
    assert told == ["W&B gets no more curves: no route"]
    assert broken.calls == 1


def test_a_service_that_can_not_be_reached_at_all_is_told_of():
    def refuse():
        raise OSError("refused")

    told = []
    logger = Aside("MLflow", refuse, told.append)
    logger.scalars({}, 1)
    logger.close()
    assert told == ["MLflow gets no more curves: refused"]


def test_a_service_that_hangs_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(loggers, "CLOSE_TIMEOUT_S", 0.01)
    goes_on, told = threading.Event(), []
    slow = SimpleNamespace(
        scalars=lambda values, samples: goes_on.wait(DEADLINE_S), close=lambda: None
    )
    logger = Aside("W&B", lambda: slow, told.append)
    for _ in range(2 * MAX_PENDING):
        logger.scalars({}, 1)
    assert len(logger._pending) == MAX_PENDING
    logger.close()
    goes_on.set()
    (text,) = told
    assert "for its last curves" in text


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"wandb_project": "p"}, "pip install wandb"),
        ({"mlflow_uri": "sqlite:///x"}, "pip install mlflow"),
        ({"port": 8080}, r"pip install 'ray\[default\]'"),
    ],
)
def test_missing_packages_are_named_before_anything_starts(monkeypatch, settings, needs):
    monkeypatch.setattr("asynception.monitoring.settings.find_spec", lambda name: None)
    with pytest.raises(InputError, match=needs):
        check_packages(MonitoringSettings(**settings))
    check_packages(MonitoringSettings())


def test_a_port_of_a_cluster_that_is_joined_is_refused():
    with pytest.raises(InputError, match=r"monitoring.port = 8080 has no effect"):
        validate(
            {
                "data": {"train": "t", "val": "v"},
                "training": {"samples": 10},
                "monitoring": {"port": 8080},
                "ray": {"address": "auto"},
            }
        )
