"""The formulas for how many servers a run needs: against recorded loops, and in their limits."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynception.info import describe
from asynception.recipe import load_config
from asynception.sizing import UPDATE_S_PER_BYTE, Traffic, traffic
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
