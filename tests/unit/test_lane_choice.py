"""Which lane is used, and when it is given up."""

import logging

import grpc
import pytest
from pydantic import ValidationError

from model.errors import InputError
from ps.lanes.choice import MAX_FAILURES, MAX_REFUSALS, LaneChoice
from ps.lanes.lane import LaneError, LaneSettings, LaneUnavailable, NotAdmitted, Refused


class FakeLane:
    def __init__(self, name):
        self.name, self.closed = name, False

    def close(self):
        self.closed = True


def choice_of(*names):
    lanes = [FakeLane(name) for name in names]
    return LaneChoice("host:1", lanes), lanes


def failing(*bad, error=LaneUnavailable):
    def call(lane):
        if lane.name in bad:
            raise error("broken")
        return lane.name

    return call


def test_the_first_lane_that_works_is_used_and_the_others_are_closed():
    choice, lanes = choice_of("shm", "tcp", "grpc")
    assert choice.use(failing("shm")) == "tcp"
    assert choice.use(failing()) == "tcp"
    assert choice.name == "tcp"
    assert [lane.closed for lane in lanes] == [True, False, False]
    choice.close()
    assert [lane.closed for lane in lanes] == [True, True, True]


def test_a_lane_that_fails_now_and_then_is_kept():
    choice, _ = choice_of("tcp", "grpc")
    for _ in range(5):
        for _ in range(MAX_FAILURES - 1):
            with pytest.raises(LaneError):
                choice.use(failing("tcp", error=LaneError))
        assert choice.use(failing()) == "tcp"


def test_a_lane_that_fails_in_a_row_is_given_up_with_one_line(caplog):
    choice, _ = choice_of("tcp", "grpc")
    for _ in range(MAX_FAILURES - 1):
        with pytest.raises(LaneError):
            choice.use(failing("tcp", error=LaneError))
    with caplog.at_level(logging.INFO):
        assert choice.use(failing("tcp", error=LaneError)) == "grpc"
    assert caplog.messages == ["shard at host:1: no tcp lane (broken); going on with grpc"]


def test_a_dead_shard_is_not_the_lanes_fault():
    choice, _ = choice_of("tcp", "grpc")
    for error in (grpc.RpcError, lambda _: Refused(grpc.StatusCode.INVALID_ARGUMENT, "no")):
        for _ in range(3 * MAX_FAILURES):
            with pytest.raises(grpc.RpcError):
                choice.use(failing("tcp", error=error))
    assert choice.name == "tcp"


def test_a_forced_lane_that_never_worked_is_an_error_of_input():
    choice, _ = choice_of("shm")
    with pytest.raises(InputError, match=r'lanes.choice = "shm": .* host:1 \(broken\).* "auto"'):
        choice.use(failing("shm"))


def test_a_forced_lane_that_takes_nobody_in_time_after_time_is_an_error_of_input():
    choice, _ = choice_of("shm")
    for _ in range(MAX_REFUSALS - 1):
        with pytest.raises(NotAdmitted):
            choice.use(failing("shm", error=NotAdmitted))
    with pytest.raises(InputError):
        choice.use(failing("shm", error=NotAdmitted))


def test_a_forced_lane_that_a_busy_server_lets_in_late_is_used():
    choice, _ = choice_of("tcp")
    for _ in range(MAX_REFUSALS - 1):
        with pytest.raises(NotAdmitted):
            choice.use(failing("tcp", error=NotAdmitted))
    assert choice.use(failing()) == "tcp"


def test_a_forced_lane_whose_first_transfers_broke_off_stays():
    choice, _ = choice_of("tcp")
    for _ in range(3 * MAX_FAILURES):
        with pytest.raises(LaneError):
            choice.use(failing("tcp", error=LaneError))
    assert choice.use(failing()) == "tcp"


def test_a_forced_lane_that_worked_stays():
    choice, _ = choice_of("shm")
    choice.use(failing())
    for _ in range(3 * MAX_FAILURES):
        with pytest.raises(LaneError):
            choice.use(failing("shm"))
    assert choice.use(failing()) == "shm"


def test_a_call_that_failed_because_its_lane_was_given_up_meanwhile_goes_on_in_the_next():
    choice, _ = choice_of("tcp", "grpc")

    def call(lane):
        if lane.name == "tcp":
            choice.use(failing("tcp"))  # another thread gives it up
            raise LaneError("the lane has been closed")
        return lane.name

    assert choice.use(call) == "grpc"


@pytest.mark.parametrize("ports", [(0, 5), (9, 8), (1, 65536), (1,)])
def test_a_range_of_ports_that_is_none_is_refused(ports):
    with pytest.raises(ValidationError):
        LaneSettings(port_range=ports)


def test_settings_name_a_lane():
    assert LaneSettings().choice == "auto"
    with pytest.raises(ValidationError):
        LaneSettings(choice="carrier pigeon")
