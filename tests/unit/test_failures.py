"""Errors that one process raises and another handles arrive as what they are."""

import grpc
import pytest
from ray.exceptions import RayError, RayTaskError

from asynception.attached import _cause
from asynception.failures import (
    Diverged,
    GroupLost,
    SessionLost,
    Stopped,
    TrainingFailed,
    one_line,
)
from asynception.session import _Evaluations
from asynception.supervisor import cause_of
from model.errors import InputError
from ps.lanes.lane import Refused
from ps.retry import ShardUnavailable


def carried(error: Exception) -> RayError:
    """What Ray makes of an actor's error in the process that asks for its answer."""
    return RayError.from_bytes(RayTaskError("method", "traceback", error).to_bytes())


@pytest.mark.parametrize(
    "error",
    [
        Diverged("the loss rises", "checkpoint-8"),
        Diverged("too many", None),
        GroupLost("a rank"),
        InputError("a = 1: no"),
        Refused(grpc.StatusCode.NOT_FOUND, "no cut named evaluation"),
        SessionLost("a server"),
        ShardUnavailable("no answer"),
        Stopped("told to"),
        TrainingFailed("no room"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_kind_words_and_fields_are_kept(error):
    cause = carried(error).cause
    assert type(cause) is type(error)
    assert (str(cause), vars(cause)) == (str(error), vars(error))


class OfTwo(Exception):
    """What it says is put together, so pickle can't make it anew."""

    def __init__(self, name, value):
        super().__init__(f"{name} = {value}")


def test_an_error_of_the_users_that_can_not_be_pickled_is_told_all_the_same():
    actors = RayTaskError("run", "Traceback:\n  line 3\nOfTwo: width = 3\n", OfTwo("width", 3))
    error = RayError.from_bytes(actors.to_bytes())
    assert one_line(cause_of(error)) == "Exception: OfTwo: width = 3"


def test_a_detached_run_that_diverged_says_from_where_to_go_on():
    raised = _cause(carried(Diverged("the loss rises", "checkpoint-8")))
    assert isinstance(raised, Diverged)
    assert raised.checkpoint == "checkpoint-8"
    assert "the last good checkpoint is checkpoint-8" in str(raised)


class _Room:
    def __init__(self, error):
        self._error = error

    def evaluated(self, reference):
        raise carried(self._error).as_instanceof_cause()


@pytest.mark.parametrize(
    "error", [Refused(grpc.StatusCode.NOT_FOUND, "no cut"), ShardUnavailable("no answer")]
)
def test_an_evaluation_that_a_server_refused_is_given_up_and_ends_no_run(error):
    evaluations = _Evaluations(None, _Room(error), None)
    evaluations.running = ["reference"]
    assert "given up" in evaluations.outcome()
    assert evaluations.running == []
