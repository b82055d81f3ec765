"""Orders for a run that goes on, by a call and by files in its folder."""

import json

import pytest
from click.testing import CliRunner
from waiting import background, eventually

from asynception import scale as scale_module
from asynception.cli import main
from asynception.monitoring.status_file import STATUS_FILE
from asynception.orders import (
    ANSWER_FILE,
    PATIENCE_S,
    REQUEST_FILE,
    Order,
    Orders,
    forget_requests,
    write_request,
)
from asynception.run_files import CONFIG_FILE, is_detached
from asynception.scale import scale
from model.errors import InputError


class Run:
    """Takes any number of workers up to 4; they come when it is told."""

    def __init__(self) -> None:
        self.num_workers = self.num_wanted = 2
        self.num_servers = 1

    @property
    def is_complete(self) -> bool:
        return self.num_workers == self.num_wanted

    @property
    def pending(self) -> str:
        return f"{self.num_workers} of {self.num_wanted}"

    def scale(self, order: Order) -> None:
        if (order.num_workers or 0) > 4:
            raise InputError("too many")
        self.num_wanted = order.num_workers or self.num_wanted
        self.num_servers = order.num_servers or self.num_servers


class Clock:
    now_s = 10.0

    def __call__(self) -> float:
        return self.now_s


def test_an_order_is_answered_once_it_is_carried_out(tmp_path):
    run, orders = Run(), Orders()
    answer = orders.give(Order(3))
    orders.carry_out(run, tmp_path)
    assert (run.num_wanted, answer.done()) == (3, False)
    run.num_workers = 3
    orders.carry_out(run, tmp_path)
    assert answer.result(0) == "3 of 3"


@pytest.mark.parametrize("text", [b"", b"\xff", b"[1]", b"{}", b'{"id": "a", "num_workers": "x"}'])
def test_a_file_that_holds_no_order_is_set_aside_and_ends_no_run(tmp_path, caplog, text):
    run, orders = Run(), Orders()
    (tmp_path / REQUEST_FILE).write_bytes(text)
    orders.carry_out(run, tmp_path)
    assert "held no order" in caplog.text
    assert not (tmp_path / REQUEST_FILE).exists()
    assert run.num_wanted == 2
    write_request(tmp_path, "b", Order(3))
    orders.carry_out(run, tmp_path)
    assert run.num_wanted == 3


def test_what_takes_long_is_answered_by_what_is_pending(tmp_path):
    run, clock = Run(), Clock()
    orders = Orders(clock)
    answer = orders.give(Order(4))
    orders.carry_out(run, tmp_path)
    clock.now_s += PATIENCE_S - 0.1
    orders.carry_out(run, tmp_path)
    assert not answer.done()
    clock.now_s += 0.1
    orders.carry_out(run, tmp_path)
    assert answer.result(0) == "2 of 4"


def test_what_is_refused_says_why(tmp_path):
    orders = Orders()
    answers = [orders.give(Order(9)), orders.give(Order(2))]
    orders.carry_out(Run(), tmp_path)
    with pytest.raises(InputError, match="too many"):
        answers[0].result(0)
    assert answers[1].result(0) == "2 of 2", "an order that is refused ends no other"


@pytest.fixture
def folder(tmp_path):
    """Of a run that goes on, and isn't detached."""
    recipe = '[data]\ntrain = "a"\nval = "b"\n[training]\nepochs = 1\n'
    (tmp_path / CONFIG_FILE).write_text(recipe)
    (tmp_path / STATUS_FILE).write_text(json.dumps({"status": "running"}))
    return tmp_path


@pytest.mark.parametrize(("num_workers", "told"), [(2, "2 of 2"), (9, "too many")])
def test_a_run_is_asked_in_its_folder(folder, num_workers, told):
    orders, run = Orders(), Run()
    asked = background(lambda: scale(str(folder), None, Order(num_workers)))
    eventually((folder / REQUEST_FILE).exists)
    orders.carry_out(run, folder)
    orders.carry_out(run, folder)
    if told == "too many":
        with pytest.raises(InputError, match=told):
            asked.result(60)
    else:
        assert asked.result(60) == told
    assert not (folder / REQUEST_FILE).exists()


def test_an_answer_to_somebody_else_is_none(folder, monkeypatch):
    monkeypatch.setattr(scale_module, "ANSWER_TIMEOUT_S", 0.3)
    answer = {"id": "another", "refused": False, "text": "no"}
    (folder / ANSWER_FILE).write_text(json.dumps(answer))
    with pytest.raises(InputError, match=r"hasn't answered in 0\.3 s"):
        scale(str(folder), None, Order(3))
    assert not (folder / REQUEST_FILE).exists(), "nobody is to find it later"


def test_a_run_that_has_ended_has_no_workers(folder):
    (folder / STATUS_FILE).write_text(json.dumps({"status": "finished"}))
    with pytest.raises(InputError, match=r"is finished.*--resume --scaling.num_workers 3"):
        scale(str(folder), None, Order(3))


def test_a_new_driver_does_not_do_what_an_earlier_one_was_asked(folder):
    write_request(folder, "old", Order(4))
    forget_requests(folder)
    run = Run()
    Orders().carry_out(run, folder)
    assert run.num_wanted == 2


def test_servers_are_ordered_as_workers_are(folder):
    orders, run = Orders(), Run()
    asked = background(lambda: scale(str(folder), None, Order(num_servers=3)))
    eventually((folder / REQUEST_FILE).exists)
    orders.carry_out(run, folder)
    assert asked.result(60) == "2 of 2"
    assert (run.num_servers, run.num_wanted) == (3, 2)


def test_a_run_that_has_ended_takes_another_number_of_servers_by_resume(folder):
    (folder / STATUS_FILE).write_text(json.dumps({"status": "failed"}))
    with pytest.raises(InputError, match=r"is failed.*--resume --scaling.num_servers 3"):
        scale(str(folder), None, Order(num_servers=3))


@pytest.mark.parametrize("options", [[], ["--num-workers", "2", "--num-servers", "2"]])
def test_an_order_is_of_one_of_the_two(tmp_path, options):
    (tmp_path / STATUS_FILE).write_text("{}")
    outcome = CliRunner().invoke(main, ["scale", str(tmp_path), *options])
    assert outcome.exit_code == 2
    assert "given, and an order is of one of the two" in outcome.output


@pytest.mark.parametrize("num_workers", ["0", "-1", "x"])
def test_a_number_that_is_none_is_refused_before_any_run_is_asked(tmp_path, num_workers):
    (tmp_path / STATUS_FILE).write_text("{}")
    outcome = CliRunner().invoke(main, ["scale", str(tmp_path), "--num-workers", num_workers])
    assert outcome.exit_code == 2
    assert "Invalid value for '--num-workers'" in outcome.output


@pytest.mark.parametrize(
    ("text", "detached"),
    [("", False), ("run=3", False), ("run.detached=false", False), ("run.detached=true", True)],
)
def test_a_run_s_folder_says_whether_it_is_detached(tmp_path, text, detached):
    (tmp_path / CONFIG_FILE).write_text(text)
    assert is_detached(tmp_path) is detached


@pytest.mark.parametrize("text", [b"[run", b"\xff"])
def test_a_config_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / CONFIG_FILE).write_bytes(text)
    with pytest.raises(InputError, match=f"{CONFIG_FILE} can't be read"):
        scale(str(tmp_path), None, Order(3))
