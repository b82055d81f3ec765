"""What a run leaves in its folder when it ends before any session begins."""

import json
from types import SimpleNamespace

import pytest

from asynception import trainer
from asynception.origin import Origin
from asynception.simulate.scenario import draw, first_state, plan_of


@pytest.fixture
def run(tmp_path, monkeypatch):
    plan = plan_of(draw(0, "async"))
    monkeypatch.setattr(trainer, "new_origin", lambda _: Origin(first_state(plan)))
    return trainer._Run(plan, SimpleNamespace(room=None, lacks=None), tmp_path)


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "interrupted"), (OSError("no room"), "failed")]
)
def test_a_run_that_ends_while_its_curves_are_opened_says_so(
    run, tmp_path, monkeypatch, error, status
):
    def end(*_):
        raise error

    monkeypatch.setattr(trainer, "open_asides", end)
    with pytest.raises(type(error)):
        run.fit()
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["samples"]) == (status, 0)
    assert (tmp_path / "config.toml").is_file()


def test_a_run_that_is_stopped_while_its_first_state_is_made_says_so(run, tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "new_origin", stop)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    result = (tmp_path / "result.json").read_text()
    assert json.loads(result)["status"] == "interrupted"

    ended = result.replace("interrupted", "finished")
    (tmp_path / "result.json").write_text(ended)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert (tmp_path / "result.json").read_text() == ended, "of a run that was to go on, as it was"
