"""Whole runs that diverge: sessions are made up, their checkpoints and what is left are real."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from asynception import trainer
from asynception.failures import Diverged, TrainingFailed
from asynception.ledger import Position
from asynception.origin import Origin
from asynception.session import Ending, Evaluation
from asynception.simulate.scenario import draw, first_state, plan_of
from asynception.totals import Progress
from ps.checkpoint_store import list_checkpoints, write_checkpoint
from ps.client import ModelState
from ps.schedule import Clocks

FAR = 1.0
"""The learning rate from which on the loss rises."""


class Session:
    """Writes three checkpoints, the first of them before the loss rose, or comes to its end."""

    begun: ClassVar[list[Origin]] = []
    remains = None
    num_worker_deaths = num_moves = 0
    num_servers_ordered = None
    good_is_known = True

    def __init__(self, plan, room, folder, reporter, origin, controls, lacks):
        self._plan, self._folder, self._origin = plan, folder, origin
        self.begun.append(origin)

    def run(self):
        saved = [self._save(updates) for updates in (10, 20, 30)]
        if self._plan.config.schedule.lr >= FAR:
            good = saved[0].name if self.good_is_known else None
            raise Diverged("the loss rises", good)
        clocks = Clocks(30, 240)
        progress = Progress(240, self._origin.totals, finished=True)
        return Ending(progress, Evaluation(clocks, 0, {"loss": 1.0}), saved[-1], 9.0)

    def _save(self, updates):
        origin = self._origin
        clocks = Clocks(origin.state.clocks.updates + updates, 8 * updates)
        vectors = {
            name: torch.full_like(vector, float(clocks.updates))
            for name, vector in origin.state.vectors.items()
        }
        extra = {
            "position": Position(8 * clocks.updates, ()).to_json(),
            "totals": origin.totals.to_json(),
            "wall_s": 1.0,
        }
        state = ModelState(clocks, vectors, {})
        return write_checkpoint(
            self._folder / "checkpoints", state, self._plan.model.tensors, extra
        )


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """A run with these settings, in the same folder each time."""
    monkeypatch.setattr(Session, "begun", [])
    monkeypatch.setattr(trainer, "Session", Session)
    plan = plan_of(draw(0, "async"))
    monkeypatch.setattr(trainer, "new_origin", lambda _: Origin(first_state(plan)))

    def run(lr=FAR, **training):
        config = plan.config
        changed = {
            "training": config.training.model_copy(update=training),
            "schedule": config.schedule.model_copy(update={"lr": lr}),
            "run": config.run.model_copy(update={"name": "trial"}),
        }
        model = replace(plan.model, config=config.model_copy(update=changed))
        return trainer._Run(
            replace(plan, model=model), SimpleNamespace(room=None, lacks=None), tmp_path
        )

    return run


def names(folder):
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_run_that_is_to_stop_ends_with_its_last_good_checkpoint_as_the_newest(run_of, tmp_path):
    with pytest.raises(Diverged, match="the last good checkpoint is checkpoint-"):
        run_of(on_divergence="stop").fit()
    (good,) = names(tmp_path)
    assert len(list(tmp_path.glob("checkpoints/diverged-*"))) == 2
    result = result_of(tmp_path)
    assert (result["status"], result["updates"], result["samples"]) == ("failed", 10, 80)
    assert result["checkpoint"].endswith(good)
    assert result["error"].startswith("Diverged: diverged: the loss rises")
    assert len(Session.begun) == 1
    # Another learning rate goes on from there.
    assert run_of(lr=FAR / 2).fit().status == "finished"
    assert Session.begun[-1].checkpoint == good
    assert Session.begun[-1].position == Position(80, ())


def test_without_a_good_checkpoint_a_run_that_is_to_stop_leaves_them_all(
    run_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(Session, "good_is_known", False)
    with pytest.raises(Diverged, match="can't be told"):
        run_of(on_divergence="stop").fit()
    assert len(names(tmp_path)) == 3


def test_a_run_that_is_to_be_warned_alone_keeps_what_it_wrote(run_of, tmp_path):
    """It diverges all the same if too many gradients hold NaN."""
    with pytest.raises(Diverged):
        run_of(on_divergence="warn").fit()
    assert len(names(tmp_path)) == 3
    assert result_of(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("good_is_known", [True, False])
def test_a_run_goes_back_as_often_as_it_takes_with_ever_lower_rates(
    run_of, tmp_path, monkeypatch, good_is_known
):
    monkeypatch.setattr(Session, "good_is_known", good_is_known)
    run = run_of(lr=4 * FAR, on_divergence="rollback", rollback_lr_factor=0.4, max_rollbacks=2)
    result = run.fit()
    assert (result.status, result.rollbacks, result.restarts) == ("finished", 2, 0)
    began_at = [origin.state.clocks.updates for origin in Session.begun]
    assert began_at == ([0, 10, 20] if good_is_known else [0, 0, 0])
    told = (tmp_path / "metrics.jsonl").read_text()
    assert re.findall(r"learning rate times ([\d.]+)", told) == ["0.4", "0.16"]


def test_a_run_that_has_gone_back_often_enough_stops_at_its_last_good_checkpoint(run_of, tmp_path):
    run = run_of(on_divergence="rollback", rollback_lr_factor=1.0, max_rollbacks=1)
    with pytest.raises(TrainingFailed, match=r"training\.max_rollbacks = 1"):
        run.fit()
    assert [origin.state.clocks.updates for origin in Session.begun] == [0, 10]
    assert result_of(tmp_path)["updates"] == 20
    assert result_of(tmp_path)["rollbacks"] == 1
