"""The formulas for how many servers a run needs: against recorded loops, and in their limits."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynception.info import describe
from asynception.plan import plan_model
from asynception.recipe import load_config
from asynception.sizing import (
    LANE_BYTES_PER_S,
    TLS_BYTES_PER_S,
    UPDATE_S_PER_BYTE,
    Traffic,
    plan_traffic,
    traffic,
)
from model.errors import InputError

ROOT = Path(__file__).parents[2]
XCEPTION_BYTES = 4 * 22_855_952
CORES = 2
"""Of the machine that the rows were recorded on; servers and workers shared them."""

amounts = st.floats(1e-3, 1e3)
sizes = st.integers(10_000, 10**9)


def recorded(work):
    rows = map(json.loads, (ROOT / "docs" / "transport.jsonl").read_text().splitlines())
    loops = [row for row in rows if (row["what"], row.get("work")) == ("tcp", work)]
    return [row for row in loops if row["workers"] > 1]


@pytest.mark.parametrize(
    ("work", "update_s"), [("momentum", UPDATE_S_PER_BYTE * XCEPTION_BYTES), ("bytes", 0.004)]
)
def test_processors_limit_the_recorded_loops_as_computed(work, update_s):
    """`bytes`: pushes that are looked through for NaN and Inf, and dropped."""
    rows = recorded(work)
    assert len(rows) >= 4
    loop = Traffic(1.0, XCEPTION_BYTES, XCEPTION_BYTES, update_s, 1.0)
    computed = CORES / (loop.server_cpu_s + loop.worker_cpu_s)
    for row in rows:
        assert row["updates_per_s"] == pytest.approx(computed, rel=0.25), row


@given(sizes, st.integers(1, 500), amounts, amounts, st.floats(0.1, 64))
def test_the_servers_that_are_said_to_suffice_do(num_bytes, num_workers, gradient_s, gbit, cores):
    network = gbit * 1e9 / 8
    update_s = UPDATE_S_PER_BYTE * num_bytes
    load = traffic(num_bytes, num_bytes, update_s, gradient_s, num_workers, network)
    num_servers = load.num_servers(cores, network)
    a_server_s = load.pushes_per_s / num_servers
    assert a_server_s * num_bytes <= network * 0.7001
    assert a_server_s * load.server_cpu_s <= cores * 0.7001
    if num_servers > 1:
        assert load.pushes_per_s / (num_servers - 1) > 0.6999 * load.limit(cores, network)


@given(sizes, st.integers(1, 500), amounts, amounts)
def test_overlap_hides_the_shorter_of_moving_and_computing(num_bytes, workers, gradient_s, gbit):
    network = gbit * 1e9 / 8
    steps = {
        overlap: traffic(num_bytes, num_bytes, 0.1, gradient_s, workers, network, overlap=overlap)
        for overlap in (False, True)
    }
    move_s = steps[False].step_s - gradient_s
    assert steps[True].step_s == pytest.approx(max(gradient_s, move_s), rel=1e-6)


@pytest.mark.parametrize(
    ("pull", "push", "update_s", "network", "limit"),
    [
        (10**9, 10**9, 1e-3, 1e9, 1.0),
        (10**8, 10**9, 1e-3, 1e9, 1.0),
        (10**9, 10**8, 1e-3, 1e9, 1.0),
        (1000, 1000, 0.5, 1e9, 2.0),
    ],
    ids=["either way", "pushes alone", "pulls alone", "updates, which no second core makes faster"],
)
def test_a_server_is_limited_by_what_is_scarcest(pull, push, update_s, network, limit):
    assert Traffic(1.0, pull, push, update_s, 1.0).limit(64, network) == pytest.approx(limit)


def test_no_network_is_faster_than_a_lane():
    quick, quicker = (traffic(10**9, 10**9, 0.1, 0.0, 1, network) for network in (1e11, 1e12))
    assert quick.step_s == quicker.step_s == pytest.approx(2e9 / LANE_BYTES_PER_S)


@given(sizes, st.integers(1, 500), amounts, amounts, st.booleans())
def test_tls_takes_time_and_processors(num_bytes, workers, gradient_s, gbit, overlap):
    network = gbit * 1e9 / 8
    sized = (num_bytes, num_bytes, 0.1, gradient_s, workers, network)
    plain, encrypted = (traffic(*sized, overlap=overlap, tls=tls) for tls in (False, True))
    assert encrypted.step_s >= plain.step_s
    assert encrypted.server_cpu_s > plain.server_cpu_s
    assert encrypted.worker_cpu_s > plain.worker_cpu_s
    assert encrypted.limit(4, network) <= plain.limit(4, network)
    assert encrypted.step_s >= 2 * num_bytes / TLS_BYTES_PER_S


def described(*overrides, step_s=0.5):
    first = ["--data.num_classes", "200", "--scaling.num_workers", "20"]
    config = load_config(ROOT / "recipes" / "quickstart.toml", [*first, *overrides])
    return config, dict(describe(config, step_s, network_gbit=1.0))


def test_what_workers_accumulate_is_pushed_once():
    config, by_one = described()
    _, by_four = described("--training.accumulate_grad_batches", "4")
    rates = [float(each["pushes"].split("/")[0]) for each in (by_one, by_four)]
    assert rates[0] > 3.5 * rates[1]
    number = re.search(r", ([\d,]+) samples/s", by_four["pushes"])[1]
    samples = 4 * config.data.batch_size * rates[1]
    assert float(number.replace(",", "")) == pytest.approx(samples, rel=0.05)
    assert rates[1] == pytest.approx(20 / (4 * 0.5), rel=0.05)


def test_what_moves_is_a_share_of_a_workers_time_and_of_each_servers_network():
    _, slow = described(step_s=100.0)
    assert slow["a worker's pulls and pushes"] == "0% of its time"
    _, quick = described(step_s=1e-6)
    assert quick["a worker's pulls and pushes"] == "100% of its time"
    _, two = described("--scaling.num_servers", "2", step_s=1e-6)
    to_each = [float(re.search(r"([\d.]+) to each", e["network"])[1]) for e in (quick, two)]
    num_servers = described()[0].scaling.num_servers
    assert to_each[0] * num_servers == pytest.approx(2 * to_each[1], rel=0.01)


def test_a_server_has_two_cores_unless_it_is_given_others():
    assert ", with 2 cores and 1 Gbit/s each" in described()[1]["servers needed"]
    own = described("--scaling.resources_per_server.CPU", "3")[1]["servers needed"]
    assert ", with 3 cores and" in own


def test_an_update_is_of_all_parameters():
    config, _ = described()
    plan = plan_model(config, 200)
    assert plan_traffic(plan, 0.5, 1e9).update_s == pytest.approx(
        UPDATE_S_PER_BYTE * 4 * plan.layout.num_parameters
    )


def test_tls_is_planned_with():
    plain, encrypted = (
        described("--security.tls", each, step_s=1e-6)[1]["servers' processors"]
        for each in ("off", "auto")
    )
    cores = [float(each.split()[0]) for each in (plain, encrypted)]
    assert cores[0] < cores[1], "this network is slower than TLS: as many pushes, which take more"


def test_overlap_is_planned_with():
    shares = [
        described("--pipeline.overlap", each, step_s=1e-6)[1]["pushes"]
        for each in ("false", "true")
    ]
    assert shares[0] == shares[1], "all moves, nothing computes"
    in_turn, overlapped = (
        described("--pipeline.overlap", each, step_s=0.01)[1]["a worker's pulls and pushes"]
        for each in ("false", "true")
    )
    assert in_turn != overlapped


def test_info_says_what_a_recipe_needs():
    overrides = ["--data.num_classes", "200", "--scaling.num_workers", "20"]
    config = load_config(ROOT / "recipes" / "quickstart.toml", overrides)
    quick, slow = (dict(describe(config, step_s, network_gbit=0.1)) for step_s in (0.001, 0.5))
    servers, fewer = (int(each["servers needed"].split(",")[0]) for each in (quick, slow))
    assert servers > fewer > 1
    assert "servers needed" not in dict(describe(config))


def test_workers_that_push_seldom_need_no_sizing():
    overrides = ["--data.num_classes", "200", "--consistency.mode", "allreduce"]
    config = load_config(ROOT / "recipes" / "quickstart.toml", overrides)
    with pytest.raises(InputError, match=r"--step-s.*allreduce"):
        list(describe(config, step_s=0.5))
