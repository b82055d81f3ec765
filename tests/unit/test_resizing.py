"""Another number of servers for a run that goes on: orders, room, and what begins after."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from test_divergence import Session as FakeSession

from asynception import reservation, trainer
from asynception.controls import Controls
from asynception.failures import SessionLost
from asynception.orders import Order
from asynception.origin import Origin
from asynception.plan import plan_model
from asynception.recipe import validate
from asynception.reservation import Reservation
from asynception.saver import Failure
from asynception.session import Session as RealSession
from asynception.simulate.run import Simulation
from asynception.simulate.scenario import draw, first_state, plan_of
from asynception.sizes import Resized, Sizes, check_servers, resized
from asynception.worker_room import SharedRoom
from model.errors import InputError

PLAN = plan_of(draw(0, "async"))
BEFORE = PLAN.config.scaling.num_servers


def nothing(_):
    """Is lacking."""


@pytest.mark.parametrize("num_servers", [1, 3, 4])
def test_the_model_is_cut_as_for_a_run_that_begins_so(num_servers):
    recipe = {
        "data": {"train": "t", "val": "v", "image_size": 32},
        "model": {"width": 0.05},
        "training": {"epochs": 1},
        "scaling": {"num_servers": 2},
    }
    plan = replace(PLAN, model=plan_model(validate(recipe), num_classes=3))
    recipe["scaling"]["num_servers"] = num_servers
    assert resized(plan, num_servers).model == plan_model(validate(recipe), num_classes=3)


@pytest.mark.parametrize(
    ("num_servers", "lack", "why"),
    [
        (BEFORE, None, "the run has so many"),
        (BEFORE + 1, "the cluster has no CPU", f"no CPU; the run goes on with {BEFORE}"),
        (10**6, None, "this model can be cut into 1 to"),
    ],
)
def test_what_cannot_be_is_refused(num_servers, lack, why):
    with pytest.raises(InputError, match=why):
        check_servers(PLAN, num_servers, lambda plan: lack)


def test_orders_of_workers_are_the_staff_s_and_those_of_servers_wait_for_the_session_s_end():
    staff = mock.Mock(is_complete=False, pending="1 of 2 workers")
    sizes = Sizes(PLAN, staff, nothing)
    sizes.scale(Order(num_workers=2))
    staff.scale.assert_called_once_with(2)
    assert (sizes.num_servers, sizes.is_complete, sizes.pending) == (None, False, "1 of 2 workers")
    sizes.scale(Order(num_servers=BEFORE + 1))
    assert (sizes.num_servers, sizes.is_complete) == (BEFORE + 1, True)
    assert sizes.pending.startswith(f"{BEFORE} servers, to be {BEFORE + 1}")
    with pytest.raises(InputError):
        sizes.scale(Order(num_servers=BEFORE))
    assert sizes.num_servers == BEFORE + 1, "a refusal changes nothing"
    sizes.forget()
    assert (sizes.num_servers, sizes.is_saving) == (None, False)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", ["async", "bounded", "sync", "averaging", "elastic"])
def test_a_session_ends_for_it_once_a_checkpoint_is_there_and_nothing_is_lost(mode):
    """The simulation checks what goes on from the checkpoint, with as many servers as before."""
    orders, carried_out = [], []
    for seed in range(6):
        scenario = draw(seed, mode)
        simulation = Simulation(scenario)
        number = 1 if scenario.config.scaling.num_servers > 1 else 2
        given = simulation.orders.give(Order(num_servers=number))
        with mock.patch.object(trainer._Run, "_resize") as resize:
            report = simulation.run()
        assert f"to be {number}: a checkpoint is written" in given.result(0)
        orders.append(number)
        carried_out += [call.args[0] for call in resize.call_args_list]
        assert report.num_sessions > len(resize.call_args_list)
    # Some runs are over before their checkpoint is there; one that was lost begins with the order.
    assert len(carried_out) >= len(orders) // 2
    assert set(carried_out) <= set(orders)


class Session(FakeSession):
    """Asks once for another number of servers, after a checkpoint."""

    asks_for = BEFORE + 2
    seen: list[object]

    def run(self):
        self.seen.append((self._plan.config.scaling.num_servers, self._origin.checkpoint))
        if len(self.seen) == 1:
            self._save(10)
            raise Resized(self.asks_for)
        return super().run()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose room can be changed, or else lacks what this says."""
    monkeypatch.setattr(Session, "seen", [], raising=False)
    monkeypatch.setattr(Session, "begun", [])
    monkeypatch.setattr(trainer, "Session", Session)
    monkeypatch.setattr(trainer, "new_origin", lambda _: Origin(first_state(PLAN)))
    config = PLAN.config.model_copy(
        update={"schedule": PLAN.config.schedule.model_copy(update={"lr": 0.1})}
    )
    plan = replace(PLAN, model=replace(PLAN.model, config=config))
    change = mock.Mock()
    held = SimpleNamespace(room=None, lacks=None, change=change)
    return trainer._Run(plan, held, tmp_path), change


def test_the_run_goes_on_with_other_servers_from_the_checkpoint_and_has_not_failed(run):
    trained, change = run
    result = trained.fit()
    assert [number for number, _ in Session.seen] == [BEFORE, Session.asks_for]
    assert Session.seen[1][1] is not None
    (plan,) = change.call_args.args
    assert plan.config.scaling.num_servers == Session.asks_for
    assert (result.status, result.restarts) == ("finished", 0)


def test_without_room_the_run_goes_on_as_it_was(run, tmp_path):
    trained, change = run
    change.side_effect = InputError("no room within 5 s")
    assert trained.fit().status == "finished"
    assert [number for number, _ in Session.seen] == [BEFORE, BEFORE]
    said = (tmp_path / "metrics.jsonl").read_text()
    assert f"not scaled to {Session.asks_for} servers: no room within 5 s" in said


def test_an_order_outlives_a_session_that_is_lost_before_it_is_carried_out(run, monkeypatch):
    trained, change = run

    def lose(session):
        session.num_servers_ordered = None
        if not session.begun[1:]:
            session.num_servers_ordered = 5
            raise SessionLost("a server stopped")
        return FakeSession.run(session)

    monkeypatch.setattr(Session, "run", lose)
    assert trained.fit().restarts == 1
    told = mock.Mock(is_complete=True, pending="")
    trained._controls.orders.carry_out(told, trained._folder)
    told.scale.assert_called_once_with(Order(num_servers=5))
    change.assert_not_called()


@pytest.mark.parametrize("saving", [False, True])
def test_without_its_checkpoint_a_session_goes_on_with_the_servers_that_it_has(saving):
    reporter = mock.Mock()
    session = RealSession(PLAN, None, Path(), reporter, Origin(first_state(PLAN)))
    sizes = Sizes(PLAN, mock.Mock(), nothing)
    sizes.num_servers, sizes.is_saving = BEFORE + 1, saving
    session._change_servers(sizes, Failure("the disk is full"))
    if saving:
        reporter.event.assert_called_once()
        assert "for want of a checkpoint" in reporter.event.call_args.args[0]
        assert (sizes.num_servers, sizes.is_saving) == (None, False)
        return
    session._change_servers(sizes, Path("an earlier one"))
    assert sizes.num_servers == BEFORE + 1, "that was begun before the order"
    sizes.is_saving = True
    with pytest.raises(Resized):
        session._change_servers(sizes, Path("its own"))
    assert sizes.num_servers is None


class Held:
    """In place of Ray's groups: what is reserved now, and in which order it came and went."""

    def __init__(self, most):
        self.most, self.log = most, []

    @contextmanager
    def reserved(self, plan, host, controls):
        number = plan.config.scaling.num_servers
        if number > self.most:
            raise InputError(f"no room for {number}")
        self.log.append(f"+{number}")
        group = SimpleNamespace(bundle_count=4)
        yield SimpleNamespace(workers=SharedRoom(group, 3, {}), number=number)
        self.log.append(f"-{number}")


@pytest.mark.parametrize(
    ("most", "log"), [(9, ["+1", "-1", "+3", "-3"]), (2, ["+1", "-1", "+1", "-1"])]
)
def test_room_is_given_back_before_other_room_is_asked_for(monkeypatch, most, log):
    held = Held(most)
    monkeypatch.setattr(reservation, "reserved", held.reserved)
    with Reservation(resized(PLAN, 1), None, Controls()) as holding:
        holding.room.workers.want({0, 2})
        if most < 3:
            with pytest.raises(InputError, match="no room for 3"):
                holding.change(resized(PLAN, 3))
        else:
            holding.change(resized(PLAN, 3))
        assert holding.room.number == min(most, 3) if most > 2 else holding.room.number == 1
        assert set(holding.room.workers.wanted) == {0, 1}, "as many workers as were wanted"
    assert held.log == log


@pytest.mark.parametrize(("free_cpus", "lacking"), [(1.0, False), (0.5, True)])
def test_what_servers_hold_counts_for_those_that_come_in_their_place(
    monkeypatch, free_cpus, lacking
):
    scaling = PLAN.config.scaling.model_copy(update={"resources_per_server": {"CPU": 1.0}})
    config = PLAN.config.model_copy(update={"scaling": scaling})
    plan = resized(replace(PLAN, model=replace(PLAN.model, config=config)), 2)
    node = {"Alive": True, "Resources": {"CPU": 8.0, "memory": 1e12}}
    monkeypatch.setattr(reservation.ray, "nodes", lambda: [node])
    free = {"CPU": free_cpus, "memory": 1e12}
    monkeypatch.setattr(reservation.ray, "available_resources", lambda: free)
    lack = Reservation(plan, None, Controls()).lacks(resized(plan, 3))
    assert (lack is not None) == lacking
    assert not lacking or "3 servers with 1 each" in lack
