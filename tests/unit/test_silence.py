"""Whose silence it is when a worker waits for a server that says nothing."""

import pytest

from asynception.silence import Silence


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def silence(clock):
    return Silence(clock)


def test_silence_counts_while_all_servers_answer(clock, silence):
    clock.now_s += 50
    assert silence.counted({0: 10.0, 1: 0.5}, 0.0) == {0: 10.0, 1: 0.5}


def test_a_worker_is_no_more_silent_than_the_servers_let_it_be(clock, silence):
    clock.now_s += 50
    assert silence.counted({0: 10.0, 1: 0.5}, 3.0) == {0: 7.0, 1: 0.0}


def test_silence_starts_again_when_all_servers_answer_again(clock, silence):
    clock.now_s += 50
    assert silence.counted({0: 60.0}, 20.0) == {0: 0.0}
    clock.now_s += 7
    assert silence.counted({0: 67.0, 1: 2.0}, 0.0) == {0: 7.0, 1: 2.0}
