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


def test_a_worker_that_hangs_is_found_beside_a_server_that_is_always_slow(clock, silence):
    counted = 0.0
    for second in range(1, 700):
        clock.now_s += 1
        counted = silence.counted({0: float(second)}, float(second % 14))[0]
    assert 699 - counted == pytest.approx(3 * 13)


def test_a_worker_that_waits_out_an_outage_is_not_given_up_for_it(clock, silence):
    """However often it is asked meanwhile; what it has been silent for before counts as well."""
    for second in range(1, 300):
        clock.now_s += 1
        assert silence.counted({0: float(second + 10)}, float(second))[0] <= 10
    clock.now_s += 5
    assert silence.counted({0: 314.0}, 0.0) == {0: 5.0}


@pytest.mark.parametrize("outage_s", [7, 20, 100])
def test_a_worker_that_died_with_a_server_counts_as_silent_from_the_end_of_the_outage(
    clock, silence, outage_s
):
    for second in range(1, outage_s + 1):
        clock.now_s += 1
        assert silence.counted({0: float(second)}, float(second)) == {0: 0.0}
    for second in range(1, 30):
        clock.now_s += 1
        assert silence.counted({0: float(outage_s + second)}, 0.0) == {0: float(second)}


def test_an_outage_before_a_worker_was_heard_of_excuses_nothing(clock, silence):
    clock.now_s += 50
    silence.counted({0: 60.0}, 20.0)
    clock.now_s += 30
    assert silence.counted({0: 25.0, 1: 90.0}, 0.0) == {0: 25.0, 1: 30.0}
