"""The arithmetic of the benchmarks of transport: spreads, ratios within a round, bars."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FIGURES = st.floats(0.01, 1e6)


@pytest.fixture(autouse=True, scope="module")
def _on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def lane_row(what: str, work: str, **figures: float) -> dict:
    return {"what": what, "work": work, "workers": 1, "shards": 1, **figures}


@given(st.lists(FIGURES, min_size=1, max_size=9))
def test_a_spread_lies_within_its_values_and_is_ordered(values):
    from measured_rows import spread

    median, low, high = spread(values)
    assert min(values) <= low <= median <= high <= max(values)


@given(st.lists(st.tuples(FIGURES, FIGURES), min_size=1, max_size=9))
def test_ratios_are_taken_within_rounds_and_a_machine_that_slows_changes_none(pairs):
    from measured_rows import Cell, over, row_of

    ours, limit = Cell("ours"), Cell("limit")
    rounds = [
        {ours: {"gbps": 0.8 * speed * load}, limit: {"gbps": speed * load}} for speed, load in pairs
    ]
    row = row_of(ours, rounds, {"x": over(ours, limit, "gbps")})
    assert row["x"] == pytest.approx(0.8)
    assert row["rounds"] == len(pairs)


def test_a_round_without_the_other_cell_counts_for_the_figure_but_not_for_the_ratio():
    from measured_rows import Cell, over, over_limits, row_of

    ours, first, second = Cell("ours"), Cell("first"), Cell("second")
    whole = {ours: {"ms": 30.0}, first: {"ms": 10.0}, second: {"ms": 15.0}}
    rounds = [whole, {ours: {"ms": 90.0}}]
    ratios = {"x": over(ours, first, "ms"), "x_sum": over_limits(ours, "ms", (first, second))}
    row = row_of(ours, rounds, ratios)
    assert (row["ms"], row["x"], row["x_sum"]) == (60.0, 3.0, 1.2)
    assert "x" not in row_of(ours, rounds[1:], ratios)


def test_every_round_begins_with_another_job_and_leaves_out_what_failed():
    from measured_rows import Cell, measure

    ran: list[str] = []

    def job(name: str):
        def run():
            ran.append(name)
            return None if name == "b" else {"ms": 1.0}

        return run

    rounds = measure({Cell(name): job(name) for name in "abc"}, 3)
    assert ran == list("abcbcacab")
    assert all(set(done) == {Cell("a"), Cell("c")} for done in rounds)


@pytest.mark.parametrize(
    ("row", "met", "missed_by"),
    [
        (lane_row("shm", "momentum", x_limit=1.25), True, 0.0),
        (lane_row("shm", "momentum", x_limit=1.5), False, 0.2),
        (lane_row("tcp", "bytes", x_pull=0.9), True, 0.0),
        (lane_row("tcp", "bytes", x_pull=0.45), False, 0.5),
        (lane_row("shm", "sgd", **{"x ray_tuned": 2.0}), False, 0.2),
        ({"what": "kernel", "rule": "sgd", "x C -O3": 1.0}, True, 0.0),
        ({"what": "kernel", "rule": "sgd", "x C -O3": 2.2}, False, 1.0),
    ],
)
def test_bars_are_met_or_missed_by_a_share_of_the_bar(row, met, missed_by):
    from transport_bars import verdicts

    (verdict,) = verdicts([row])
    assert verdict.met is met
    assert verdict.missed_by == pytest.approx(missed_by)


def test_the_best_peer_is_the_one_that_ours_is_least_ahead_of():
    from transport_bars import verdicts

    ratios = {"x tensorflow": 2.0, "x torchft": 1.2, "x torch_rpc": 3.0}
    quartiles = {f"{name}_quartiles": [value, value] for name, value in ratios.items()}
    (verdict,) = verdicts([lane_row("tcp", "sgd", **ratios, **quartiles)])
    assert (verdict.value, verdict.met) == (1.2, False)
    assert "torchft" in verdict.where


def test_rows_of_other_work_are_held_to_no_bar():
    from transport_bars import verdicts

    others = [lane_row("tcp", "momentum", x_limit=9.0), lane_row("shm", "sgd", x_limit=9.0)]
    assert verdicts([*others, {"what": "torchft", "skipped": "there is none"}]) == []


def test_the_parts_of_a_cycle_add_up_to_it():
    from transport_report import cycle_parts

    row = {"pull_ms": 8.0, "push_ms": 24.0, "shard_ms": 21.0}
    parts = cycle_parts(row, update_ms=17.0)
    assert sum(parts.values()) == pytest.approx(32.0)
    assert parts["update"] == 17.0
    slow = cycle_parts(row, update_ms=30.0)  # a round in which the update alone was held up
    assert sum(slow.values()) == pytest.approx(32.0)
    assert min(slow.values()) >= 0


def test_tables_replace_what_was_between_the_comments_and_nothing_else():
    from transport_report import BEGIN, END, replace_results

    page = f"above\n{BEGIN}\nold\n{END}\nbelow\n"
    once = replace_results(page, ["new"])
    assert once.startswith("above\n")
    assert once.endswith("\nbelow\n")
    assert "old" not in once
    assert "new" in once
    assert replace_results(once, ["new"]) == once
