"""What the doctor makes of clocks, links, rooms, tokens and versions of several nodes."""

import math
import time

import pytest
from doctor_verdicts import gravity
from hypothesis import given
from hypothesis import strategies as st

from asynception.doctor import links
from asynception.doctor.clocks import SKEWED_S, WRONG_S, Reading, judge_clock, measure_clock
from asynception.doctor.finding import Finding
from asynception.doctor.links import Peer, judge_link, plan_rounds
from asynception.doctor.report import gathered
from asynception.doctor.room import judge_room
from asynception.doctor.strangers import judge_strangers, measure_strangers
from asynception.doctor.tokens import judge_token
from asynception.doctor.versions import (
    installed_versions,
    judge_alike,
    judge_versions,
    requirements,
)

WAYS = st.floats(0, 2)


@given(st.floats(-1000, 1000), st.lists(st.tuples(WAYS, WAYS), min_size=1, max_size=5))
def test_no_network_makes_a_right_clock_wrong_or_a_wrong_one_right(ahead_s, ways):
    readings = [
        Reading(at, at + out + ahead_s, at + out + back)
        for at, (out, back) in enumerate(ways, start=1000)
    ]
    best = min(readings, key=lambda reading: reading.within_s)
    assert abs(best.ahead_s - ahead_s) <= best.within_s + 1e-6
    verdict = judge_clock(readings)
    gravity(verdict)
    if abs(ahead_s) < SKEWED_S - 1e-6:
        assert verdict.level == "ok"
    if abs(ahead_s) > WRONG_S + 2 * best.within_s + 1e-6:
        assert verdict.level == "fail"


def test_the_clock_here_agrees_with_itself():
    assert measure_clock(time.time).level == "ok"
    assert measure_clock(lambda: time.time() + 30).level == "warn"


@given(st.integers(1, 200))
def test_every_node_is_measured_with_neighbours_and_in_one_pair_at_a_time(num_nodes):
    rounds = plan_rounds(num_nodes)
    pairs = [pair for each in rounds for pair in each]
    assert (
        len(set(map(frozenset, pairs))) == len(pairs) == max(1, num_nodes if num_nodes > 2 else 1)
    )
    assert {node for pair in pairs for node in pair} == set(range(num_nodes))
    for each in rounds:
        nodes = [node for pair in each for node in set(pair)]
        assert len(nodes) == len(set(nodes))
    assert len(rounds) <= 3


SPEEDS = st.floats(1.0, 1e11)


@given(SPEEDS, SPEEDS, st.floats(1e-6, 1), st.floats(1, 100), st.integers(0, 1 << 30))
def test_a_faster_link_is_never_worse(there, back, round_trip_s, times, num_bytes):
    now = judge_link(there, back, round_trip_s, num_bytes, False)
    assert gravity(now) >= gravity(
        judge_link(there * times, back * times, round_trip_s / times, num_bytes, False)
    )
    assert gravity(now) == gravity(judge_link(back, there, round_trip_s, 0, True))


def test_links_are_judged_by_speed_symmetry_and_latency():
    assert judge_link(1.2e9, 1.2e9, 1e-4, 0, False).level == "ok"
    assert judge_link(1.2e9, 0.35e9, 1e-4, 0, False).level == "warn"
    assert judge_link(1.2e9, 1.2e9, 5e-3, 0, False).level == "warn"
    assert judge_link(1.2e8, 1.2e8, 1e-4, 0, False).level == "warn"
    assert judge_link(1.2e7, 1.2e7, 1e-4, 0, False).level == "fail"
    assert judge_link(1.2e9, 1.2e9, 0.3, 0, False).level == "fail"


def named(**speeds):
    pairs = {(ord(pair[0]) - ord("a"), ord(pair[1]) - ord("a")): s for pair, s in speeds.items()}
    return list(links.judge_nodes({pair: 1e9 * speed for pair, speed in pairs.items()}))


def test_a_node_whose_links_are_all_slow_is_named():
    assert named(ab=0.12, bc=0.1, ca=1.2) == [1]
    assert named(ab=0.0, bc=0.0, ca=1.2) == [1], "no connection at all"
    assert named(ab=0.1, bc=0.1, cd=1.2, da=1.1) == [1]
    assert named(ab=0.1, bc=0.1, cd=0.1, de=0.1, ef=1.2, fa=1.1) == [1, 2, 3], "or two of them"
    assert named(ab=1.2, bc=0.1, ca=1.2) == [], "that is one way, not a node's"
    assert named(ab=0.12, bc=0.12, ca=0.12) == []
    assert named(ab=0.12, bc=0.1, ca=0.2) == [], "the others are hardly faster"
    assert named(ab=0.4, bc=0.4, ca=4) == [], "slower, but not slow"
    assert named(ab=0.1) == []
    verdict = links.judge_nodes({(0, 1): 1.2e8, (1, 2): 1e8, (2, 0): 2.5e9})[1]
    assert verdict.level == "warn"
    assert "at most 0.12 GB/s on either link, where the others have 2.50" in verdict.found


def test_two_peers_measure_the_link_between_them(monkeypatch):
    monkeypatch.setattr(links, "MEASURED_S", 0.05)
    one, other = Peer("127.0.0.1", None), Peer("127.0.0.1", None)
    bytes_per_s, round_trip_s = one.measure(*other.open())
    assert bytes_per_s > 1e6
    assert 0 < round_trip_s < 1
    assert math.isfinite(bytes_per_s)


def test_a_peer_listens_within_the_range_and_to_its_own_token_alone(monkeypatch):
    monkeypatch.setattr(links, "MEASURED_S", 0.05)
    _, free, _ = Peer("127.0.0.1", None).open()
    peer = Peer("127.0.0.1", (free + 1, free + 50))
    host, port, token = peer.open()
    assert free < port <= free + 50
    with pytest.raises(OSError, match=r"closed|reset|Broken pipe"):
        Peer("127.0.0.1", None).measure(host, port, bytes(len(token)))


AMOUNTS = st.dictionaries(st.sampled_from(["CPU", "GPU", "memory"]), st.integers(0, 100))


@given(AMOUNTS, AMOUNTS, AMOUNTS)
def test_room_fails_if_there_never_is_enough_and_warns_if_not_now(free, taken, wanted):
    total = {name: free.get(name, 0) + taken.get(name, 0) for name in {**free, **taken}}
    verdict = judge_room(2, total, free, wanted)
    fits, fits_now = (
        all(there.get(name, 0) >= amount for name, amount in wanted.items())
        for there in (total, free)
    )
    assert gravity(verdict) == (0 if fits_now else 1 if fits else 2)


def test_a_cluster_without_token_is_worse_the_more_people_reach_it():
    levels = [
        judge_token(False, False, host).level
        for host in ("127.0.0.1", "::1", "10.0.0.1", "head.local", "8.8.8.8")
    ]
    assert levels == ["ok", "ok", "warn", "warn", "fail"]
    for host in ("127.0.0.1", "10.0.0.1", "8.8.8.8"):
        assert gravity(judge_token(True, False, host)) == 0
        assert gravity(judge_token(False, True, host)) == 0


@given(st.sampled_from(["2.4", "2.5", "2.5.1", "3.0", None]))
def test_versions_fail_where_a_requirement_is_not_met(version):
    installed = {"python": "3.11.7"} | ({"torch": version} if version else {})
    verdict = judge_versions((3, 11), ["torch>=2.5", "onnx>=1 ; extra == 'onnx'"], installed)
    gravity(verdict)
    assert (verdict.level == "ok") == (version not in ("2.4", None))
    assert judge_versions((3, 10), ["torch>=2.5"], {"torch": "2.5"}).level == "fail"
    assert judge_versions((3, 11), [], installed).level == "warn"


def test_what_is_installed_here_meets_what_is_required():
    assert judge_versions((3, 11), requirements(), installed_versions()).level == "ok"


def test_nodes_must_have_one_software():
    here = {"python": "3.11.7", "torch": "2.5"}
    assert gravity(judge_alike({"here": here, "a": dict(here)})) == 0
    verdict = judge_alike({"here": here, "a": here, "b": {**here, "torch": "2.6"}})
    assert gravity(verdict) == 2
    assert "2.6 at b" in verdict.found


def test_strangers_are_told_by_name():
    owners = {"ps": ["asynception"], "model": ["asynception", "modelkit"]}
    assert "modelkit" in judge_strangers(None, owners).found
    assert gravity(judge_strangers(None, owners)) == 2
    assert gravity(judge_strangers("ps is another", {})) == 2
    assert gravity(judge_strangers(None, {"ps": ["asynception"], "model": []})) == 0
    assert measure_strangers().level == "ok"


LINES = st.builds(
    Finding,
    st.sampled_from(["memory", "clock"]),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["ok", "warn", "fail"]),
    st.sampled_from(["much", "little"]),
    st.just(""),
)


@given(st.lists(LINES))
def test_no_trouble_is_lost_in_the_table(findings):
    lines = gathered(findings)
    for each in findings:
        assert any(
            line.check == each.check
            and line.level == each.level
            and (each.level == "ok" or line.found == each.found)
            for line in lines
        )
    assert len(lines) <= len(findings)
    assert len({(line.check, line.level, line.found) for line in lines}) == len(lines)
