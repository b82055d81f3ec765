"""What people see of a detached run, and how they are told that it has ended."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RayTaskError,
)
from rich.console import Console

from asynception import attached
from asynception.config import RayConfig, TrainConfig
from asynception.console import Display
from asynception.failures import Diverged, Stopped, TrainingFailed
from asynception.recipe import save_config
from asynception.relay import FIRST_LINES, MAX_LINES, Mark, Position, Relay, show
from model.errors import InputError

ENDED = {"finished": None, "failed": "InputError: too bad", "interrupted": None}


def config(**run) -> TrainConfig:
    sections = {"data": {"train": "t", "val": "v"}, "training": {"epochs": 1}}
    return TrainConfig.model_validate({**sections, "run": run, "ray": {"address": "1.2.3.4:5"}})


def test_a_run_cannot_outlive_a_ray_of_its_own():
    given = config(detached=True).model_dump(mode="json")
    with pytest.raises(ValidationError, match=r"ray\.address"):
        TrainConfig.model_validate({**given, "ray": {"address": None}})


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 8))
def test_whoever_asks_again_and_again_sees_every_line_once(groups, first_ask):
    """The first answer begins with a few old lines."""
    relay, said, seen = Relay("run"), [], []
    mark: Mark | None = None
    for number, size in enumerate(groups):
        for _ in range(size):
            said.append(f"line {len(said)}")
            relay.add(said[-1])
        if number >= first_ask:
            news = relay.news(mark, ended=False)
            seen += [line.what for line in news.lines]
            mark = news.following
    seen += [line.what for line in relay.news(mark, ended=True).lines]
    assert seen == said[len(said) - len(seen) :]
    assert len(seen) >= min(len(said), FIRST_LINES)


def test_a_driver_that_was_started_again_is_shown_from_its_first_line():
    before, after = Relay("run"), Relay("run")
    for number in range(5):
        before.add(f"before {number}")
    mark = before.news(None, ended=False).following
    after.add("after")
    assert [line.what for line in after.news(mark, ended=False).lines] == ["after"]


def test_old_lines_are_forgotten_and_missed_by_who_was_away():
    relay = Relay("run")
    mark = relay.news(None, ended=False).following
    for number in range(MAX_LINES + 7):
        relay.add(str(number))
    lines = relay.news(mark, ended=False).lines
    assert [line.what for line in lines] == [str(n) for n in range(7, MAX_LINES + 7)]


def test_what_a_run_waits_for_is_shown_before_its_samples_are_known(monkeypatch, capsys):
    relay = Relay("run")

    class Driver:
        """Waits when it is asked first, and has ended when it is asked again."""

        asked = 0

        def news(self, since):
            self.asked += 1
            if self.asked == 1:
                relay.add("waiting for room")
            else:
                relay.display("run", 100, Console()).point(25, 60.0, "loss 2")
            return relay.news(since, ended=self.asked == 2)

        def outcome(self):
            return "result"

    monkeypatch.setattr(attached, "ask", lambda method, *arguments: method(*arguments))
    monkeypatch.setattr(attached, "POLL_S", 0.0)
    assert attached.follow(Driver(), "run") == "result"
    waits, point = capsys.readouterr().out.splitlines()
    assert waits.endswith("waiting for room")
    assert "25/100 samples (25.0%)" in point


def train(display: Display) -> None:
    display.line("checkpoint 1")
    display.bar(10, 60.0, "loss 2")
    display.point(10, 60.0, "loss 2")
    display.line("checkpoint 2")


def shown(*, terminal: bool, relayed: bool) -> list[str]:
    """The lines of a run that is shown as it goes on, or afterwards and elsewhere."""
    text = io.StringIO()
    display = Display("run", 100, Console(file=text, force_terminal=terminal, width=90))
    if relayed:
        relay = Relay("run")
        train(relay.display("run", 100, Console()))
        show(relay.news(None, ended=True), display)
    else:
        train(display)
    display.close()
    return text.getvalue().splitlines()


def test_a_relayed_run_looks_in_a_log_like_one_that_is_shown_at_once():
    relayed, directly = (shown(terminal=False, relayed=each) for each in (True, False))
    assert [line[8:] for line in relayed] == [line[8:] for line in directly]
    assert len(relayed) == 3
    assert "10/100 samples" in relayed[1]


def test_on_a_terminal_a_relayed_run_has_a_bar_and_no_lines_about_progress():
    lines = shown(terminal=True, relayed=True)
    progress = [line for line in lines if "10/100 samples" in line]
    assert progress
    assert all("━" in line for line in progress)
    assert any("checkpoint 2" in line for line in lines)


def test_a_position_is_where_the_bar_is_put():
    relay = Relay("run")
    display = relay.display("run", 50, Console())
    display.bar(7, 1.5, "loss 1")
    news = relay.news(None, ended=False)
    assert (news.bar, news.total_samples) == (Position(7, 1.5, "loss 1"), 50)


@pytest.mark.parametrize(
    "error",
    [InputError("a = 1: no"), TrainingFailed("x"), Stopped("y"), Diverged("too many", None)],
)
def test_what_ended_a_run_elsewhere_is_raised_here(error):
    raised = attached._cause(RayTaskError("outcome", "traceback", error))
    assert type(raised) is type(error)
    assert str(raised) == str(error)


def test_other_errors_of_a_run_elsewhere_fail_it_in_one_line():
    raised = attached._cause(RayTaskError("outcome", "traceback", KeyError("k")))
    assert type(raised) is TrainingFailed
    assert str(raised) == "KeyError: 'k'"


class Driver:
    """Its answers, or what Ray raises in their place; the last one again and again."""

    def __init__(self, monkeypatch, *answers):
        self._answers, self.now_s = list(answers), 0.0
        clock = SimpleNamespace(monotonic=lambda: self.now_s, sleep=self._sleep)
        monkeypatch.setattr(attached, "time", clock)
        monkeypatch.setattr(attached.ray, "get", self._get)
        self.news = SimpleNamespace(remote=lambda *_: None)

    def _sleep(self, seconds):
        self.now_s += seconds

    def _get(self, reference, timeout):
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, GetTimeoutError):
            self.now_s += timeout
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_driver_that_is_started_again_is_waited_for(monkeypatch):
    away = ActorUnavailableError("away", None)
    assert attached.ask(Driver(monkeypatch, away, away, "here").news) == "here"


@pytest.mark.parametrize("silent", [ActorUnavailableError("away", None), GetTimeoutError("late")])
def test_a_driver_that_does_not_answer_is_given_up_in_one_line(monkeypatch, silent):
    driver = Driver(monkeypatch, silent)
    with pytest.raises(TrainingFailed, match=r"has not answered for 120 s .* attach again"):
        attached.ask(driver.news)
    assert driver.now_s < 3 * attached.RETURN_TIMEOUT_S


def test_a_driver_that_is_dead_for_good_is_told_of(monkeypatch):
    with pytest.raises(TrainingFailed, match=r"is dead .* go on with --resume"):
        attached.ask(Driver(monkeypatch, ActorDiedError()).news)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "RUN").mkdir()
    save_config(config(name="RUN", detached=True), tmp_path / "RUN")
    return tmp_path / "RUN"


def test_a_folder_says_where_its_run_goes_on(folder):
    assert attached.named(str(folder), None) == ("RUN", RayConfig(address="1.2.3.4:5"))
    assert attached.named(str(folder), "other:1") == ("RUN", RayConfig(address="other:1"))
    assert attached.named("RUN", None) == ("RUN", RayConfig(address="auto"))


@pytest.mark.parametrize("status", ENDED)
def test_a_run_that_has_ended_says_how(folder, status):
    text = json.dumps({"status": status, "error": ENDED[status]})
    (folder / "result.json").write_text(text)
    if status == "finished":
        assert attached._ended(str(folder), "RUN", RayConfig()) == text
    else:
        with pytest.raises(TrainingFailed, match=ENDED[status] or status):
            attached._ended(str(folder), "RUN", RayConfig())


def test_a_run_that_is_nowhere_is_bad_input():
    with pytest.raises(InputError, match=r"RUN doesn't go on at ray.address = auto"):
        attached._ended("RUN", "RUN", RayConfig(address="auto"))
