"""Calls to a shard whose answers are lost, or are none."""

import grpc
import pytest
from google.protobuf.message import DecodeError

from ps.lanes.lane import LaneError, Refused
from ps.lanes.stream import StreamError
from ps.retry import Retrying, RetryPolicy, ShardUnavailable

POLICY = RetryPolicy(deadline_s=5.0, backoff_s=1.0)


class Shard:
    """Fails so often, on a clock that only pauses move."""

    def __init__(self, error: Exception, num_failures: int) -> None:
        self.error, self.num_failures = error, num_failures
        self.now_s, self.num_calls = 0.0, 0

    def call(self, timeout_s: float) -> str:
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise self.error
        return "answer"

    def sleep(self, pause_s: float) -> None:
        self.now_s += pause_s

    def __call__(self) -> str:
        return Retrying("here", POLICY, lambda: self.now_s, self.sleep)(self.call)


LOST = [
    LaneError("the connection ended"),
    StreamError("3 bytes instead of 4"),
    DecodeError("half a header"),
    Refused(grpc.StatusCode.UNAVAILABLE, "soon"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_what_is_no_answer_is_asked_for_again_until_the_deadline(error):
    assert Shard(error, num_failures=2)() == "answer"
    shard = Shard(error, num_failures=100)
    with pytest.raises(ShardUnavailable, match="here gave no answer in 5 s"):
        shard()
    assert shard.now_s <= POLICY.deadline_s


def test_what_no_retry_can_mend_is_raised_at_once():
    shard = Shard(Refused(grpc.StatusCode.INVALID_ARGUMENT, "no"), num_failures=1)
    with pytest.raises(Refused):
        shard()
    assert shard.num_calls == 1


def test_a_shard_that_is_lost_is_not_asked_again():
    shard = Shard(LOST[0], num_failures=100)
    retrying = Retrying("here", POLICY, lambda: shard.now_s, shard.sleep)
    retrying.is_lost = lambda: shard.num_calls == 2
    with pytest.raises(ShardUnavailable, match="here is lost"):
        retrying(shard.call)
    assert shard.num_calls == 2
