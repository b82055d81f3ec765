"""Shards are asked how they are, one question at a time, and nobody waits for the answer."""

import threading

from waiting import DEADLINE_S, eventually

from asynception.monitoring.shard_watch import ShardWatch
from ps.messages import ShardStatus
from ps.schedule import Clocks


class Slow:
    """Shards that answer when they are told to."""

    def __init__(self):
        self.num_asked, self.may_answer = 0, threading.Semaphore(0)

    def describe(self):
        self.num_asked, self.thread = self.num_asked + 1, threading.current_thread()
        assert self.may_answer.acquire(timeout=DEADLINE_S)
        return [ShardStatus(Clocks(self.num_asked, 0))]


def test_an_answer_is_of_the_time_of_its_question():
    watch, shards = ShardWatch(), Slow()
    watch.attend(shards)
    for time_s in (5.0, 6.0, 7.0):
        watch.ask(time_s)
        assert watch.reading.shards == ()
    eventually(lambda: shards.num_asked == 1)
    shards.may_answer.release()

    def answered():
        watch.ask(8.0)
        return watch.reading.shards

    eventually(answered)
    assert watch.reading.time_s == 5.0
    assert watch.reading.shards[0].clocks.updates == 1
    shards.may_answer.release(2)
    watch.ask(9.0, wait=True)
    assert (watch.reading.time_s, watch.reading.shards[0].clocks.updates) == (9.0, 3)
    watch.attend(None)
    assert watch.reading.shards, "the last word stays"


def test_a_thread_ends_with_the_shards_that_it_asks():
    watch, asked = ShardWatch(), [Slow() for _ in range(3)]
    for shards in asked:
        shards.may_answer.release(9)
        watch.attend(shards)
        watch.ask(1.0, wait=True)
    *gone, last = asked
    eventually(lambda: not any(shards.thread.is_alive() for shards in gone))
    assert last.thread.is_alive()
    watch.attend(None)
    eventually(lambda: not last.thread.is_alive())
