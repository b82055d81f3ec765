"""The simulation's own parts: virtual time, deaths, the network, the watch."""

import threading

import pytest

from asynception.simulate import world as worlds
from asynception.simulate.network import Network, Weather
from asynception.simulate.pace_watch import PaceWatch
from asynception.simulate.waiting import Chain, Condition, Executor
from asynception.simulate.world import NoProgress, Party, Signal, Violation, World


@pytest.fixture
def world():
    made = World(seed=1, limit_s=100.0)
    worlds.enter(made)
    yield made
    worlds.leave()


def test_time_passes_only_while_all_wait(world):
    seen = []

    def sleeper(seconds):
        world.sleep(seconds)
        seen.append((seconds, world.now_s))

    def body():
        for seconds in (3.0, 1.0, 2.0):
            world.spawn(world.party, lambda seconds=seconds: sleeper(seconds))
        world.sleep(10)

    world.run(Party("main"), body)
    assert seen == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    assert world.now_s == 10.0


def test_a_party_dies_as_a_whole_and_others_go_on(world):
    dying, seen = Party("dying"), []

    def victim():
        try:
            world.sleep(5)
            seen.append("lived on")
        finally:
            seen.append("unwound")

    def body():
        for _ in range(2):
            world.spawn(dying, victim)
        world.sleep(1)
        world.kill(dying)
        world.sleep(10)
        assert seen == ["unwound", "unwound"]

    world.run(Party("main"), body)


def test_a_frozen_party_goes_on_later(world):
    frozen, seen = Party("frozen"), []

    def body():
        world.spawn(frozen, lambda: (world.sleep(1), seen.append(world.now_s)))
        world.sleep(0.5)
        frozen.frozen_until_s = 7.0
        world.sleep(10)

    world.run(Party("main"), body)
    assert seen == [7.0]


def test_a_deadlock_ends_the_run(world):
    with pytest.raises(NoProgress, match="nobody is left"):
        world.run(Party("main"), lambda: Signal(world).wait())


def test_waiting_for_ever_in_turns_ends_the_run(world):
    def body():
        while True:
            world.sleep(1)

    with pytest.raises(NoProgress, match="not at an end"):
        world.run(Party("main"), body)


def test_what_any_thread_raises_ends_the_run(world):
    def body():
        world.spawn(Party("other"), lambda: (_ for _ in ()).throw(KeyError("lost")).__next__())
        world.sleep(5)

    with pytest.raises(KeyError):
        world.run(Party("main"), body)


def test_the_seed_settles_who_is_first():
    def order(seed):
        made, seen = World(seed, 10.0), []

        def body():
            for number in range(8):
                made.spawn(made.party, lambda number=number: seen.append(number))
            made.sleep(1)

        made.run(Party("main"), body)
        return seen

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(5)}) > 1


def test_executors_and_chains_keep_their_order_and_errors(world):
    def body():
        executor, chain, seen = Executor(2), Chain("chain"), []

        def late(seconds):
            world.sleep(seconds)
            seen.append(seconds)
            return seconds

        endings = [executor.submit(late, seconds) for seconds in (2.0, 1.0, 0.5)]
        assert [ending.result() for ending in endings] == [2.0, 1.0, 0.5]
        assert seen == [1.0, 0.5, 2.0]
        failing = chain.submit(lambda: 1 / 0)
        following = chain.submit(lambda: 3)
        assert isinstance(failing.exception(), ZeroDivisionError)
        assert following.result() == 3

    world.run(Party("main"), body)


def test_a_condition_gives_its_lock_back_while_it_waits(world):
    def body():
        lock, state = threading.Lock(), []
        condition = Condition(lock)

        def change():
            world.sleep(1)
            with lock:
                state.append(1)
                condition.notify_all()

        world.spawn(world.party, change)
        with condition:
            assert condition.wait_for(lambda: bool(state), 5)
        assert world.now_s == 1.0
        with condition:
            assert not condition.wait_for(lambda: len(state) > 1, 2)
        assert world.now_s == 3.0

    world.run(Party("main"), body)


def test_after_healing_nothing_is_lost(world):
    network = Network(world, Weather(lost=0.5, repeated=0.5, late=0.5, late_s=9, heals_s=50.0))
    one, other = Party("one"), Party("other")
    before = [network.delay_s(one, other) for _ in range(200)]
    assert None in before
    network.cut_off(["one"], 1000.0)
    assert {network.delay_s(one, other) for _ in range(50)} == {None}
    world.now_s = 50.0
    after = [network.delay_s(one, other) for _ in range(200)]
    assert None not in after
    assert max(after) < 1.0
    assert not any(network.repeats() for _ in range(200))


def test_the_pace_watch_finds_who_runs_ahead():
    pace = PaceWatch(max_lead=1, num_workers=2)
    for _ in range(2):
        pace.begin(0)
        pace.settle(0, 0)
    with pytest.raises(Violation):
        pace.begin(0)
    pace.fence(1, 1)
    pace.begin(0)
