"""Runs as they lie on disk, and as groups."""

import json

import pytest
from compared_runs import eval_line, point_line, write_run
from hypothesis import given
from hypothesis import strategies as st

from asynception.compare.groups import group_runs
from asynception.compare.reading import RunRecord, _unreverted, find_runs, read_run
from asynception.compare.summary import lost_share, main_metric, rate_of
from model.errors import InputError


def test_times_are_of_training_alone(tmp_path):
    run = write_run(tmp_path / "run", curve=[(16, 0.1), (64, 0.2)], step_s=0.5, began_s=40)
    assert run.began_s == pytest.approx(40)
    # The evaluations were done a second later than the state that they measured.
    assert [each.time_s for each in run.evaluations] == pytest.approx([1.0, 4.0])
    assert rate_of(run) == pytest.approx(16)


def test_the_time_of_a_state_lies_between_the_points_around_it(tmp_path):
    run = write_run(tmp_path / "run", curve=[(80, 0.5)], began_s=0)
    lines = [point_line(80, 10, 2.0), eval_line(40, 9.5, 0.3), eval_line(80, 11, 0.5)]
    record = RunRecord(run.path, run.config, run.result, lines)
    assert [each.time_s for each in record.evaluations] == pytest.approx([5.0, 10.0])


def test_lost_samples_are_in_no_state(tmp_path):
    servers = {"scaling": {"num_servers": 2}}
    run = write_run(tmp_path / "run", curve=[(80, 0.5)], settings=servers)
    # Of 10 pushes, the last 5 were lost at both servers.
    points = [point_line(40, 5, 2.0), {**point_line(80, 10, 2.0), "dropped": 10}]
    lines = [*points, eval_line(40, 12, 0.5)]
    record = RunRecord(run.path, run.config, run.result, lines)
    assert record.evaluations[0].time_s == pytest.approx(5)
    spread_out = [{**point, "dropped": 5} for point in points]
    record = RunRecord(run.path, run.config, run.result, [*spread_out, eval_line(30, 12, 0.5)])
    # 20 of 40 samples kept after 5 s, 40 of 80 after 10 s.
    assert record.evaluations[0].time_s == pytest.approx(7.5)


def test_late_reports_do_not_move_the_beginning(tmp_path):
    run = write_run(tmp_path / "run", curve=[(80, 0.5)])
    # One of two workers alone has reported by the first point.
    lines = [point_line(8, 11, 1.0), point_line(80, 20, 2.1)]
    record = RunRecord(run.path, run.config, run.result, lines)
    assert record.began_s == pytest.approx(20 - (1 + 9 * 2.1) / 2)


def test_lines_that_a_kill_cut_short_are_skipped(tmp_path):
    folder = write_run(tmp_path / "run").path
    whole = read_run(folder).lines
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "time\n\n[1]\n')
    assert read_run(folder).lines == whole


@given(st.lists(st.integers(1, 9), max_size=12))
def test_what_a_return_to_a_checkpoint_undid_is_left_out(samples):
    kept = _unreverted({"samples": each, "at": i} for i, each in enumerate(samples))
    found = [line["samples"] for line in kept]
    assert found == sorted(set(found))
    # A line stays if and only if no later one is at its samples or before.
    assert [line["at"] for line in kept] == [
        i for i, each in enumerate(samples) if all(each < later for later in samples[i + 1 :])
    ]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no run"):
        read_run(tmp_path)


def test_a_comparison_stands_for_its_runs(tmp_path):
    first = write_run(tmp_path / "out" / "runs" / "sync-seed0", mode="sync").path
    second = write_run(tmp_path / "out" / "runs" / "async-seed0").path
    lone = write_run(tmp_path / "lone").path
    assert set(find_runs([tmp_path / "out"])) == {first, second}
    assert find_runs([lone, second, lone]) == [lone, second]


def test_groups_are_runs_that_differ_in_their_seeds_alone(tmp_path):
    runs = [
        write_run(tmp_path / f"{mode}-{seed}", mode=mode, seed=seed)
        for seed in (1, 0)
        for mode in ("sync", "async")
    ]
    groups = group_runs(runs)
    assert [group.label for group in groups] == ["sync", "async"]
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1], [0, 1]]


def test_functions_of_ones_own_count_by_their_text(tmp_path):
    text = "def build(num_classes):\n    return None\n"
    runs = []
    for name, source in (("one", text), ("two", text), ("other", text + "# more\n")):
        (tmp_path / f"{name}.py").write_text(source)
        function = f"{tmp_path / name}.py:build"
        settings = {"data": {"train": function}}
        runs.append(write_run(tmp_path / "runs" / name, settings=settings))
        config = runs[-1].config
        model = type(config.model)(factory=function)
        again = config.model_copy(update={"model": model})
        runs.append(RunRecord(runs[-1].path, again))
    groups = group_runs(runs)
    assert [[run.name for run in group.runs] for group in groups] == [
        ["one", "two"],
        ["one", "two"],
        ["other"],
        ["other"],
    ]


def test_groups_of_one_mode_are_named_for_what_they_differ_in(tmp_path):
    runs = [
        write_run(tmp_path / f"w{count}", settings={"scaling": {"num_workers": count}})
        for count in (2, 4)
    ]
    runs.append(write_run(tmp_path / "sync", mode="sync"))
    labels = [group.label for group in group_runs(runs)]
    assert labels == ["async, num_workers 2", "async, num_workers 4", "sync"]


def test_a_slow_worker_names_its_group(tmp_path):
    slow = {"data": {"lease_batches": 1, "prefetch_batches": 1}}
    slow |= {"scaling": {"slow_workers": {"1": 20}}}
    runs = [write_run(tmp_path / "plain"), write_run(tmp_path / "slow", settings=slow)]
    assert [group.label for group in group_runs(runs)] == ["async", "async, slow 1x20"]


def test_groups_that_differ_in_much_are_named_for_their_runs(tmp_path):
    others = {"data": {"batch_size": 16, "image_size": 64, "shuffle_window": 64}}
    runs = [write_run(tmp_path / "plain"), write_run(tmp_path / "other", settings=others)]
    assert [group.label for group in group_runs(runs)] == ["plain", "other"]


def test_runs_of_two_measures_are_not_compared(tmp_path):
    runs = [
        write_run(tmp_path / "one"),
        write_run(tmp_path / "two", settings={"training": {"objective": "softmax"}}),
    ]
    with pytest.raises(InputError, match=r"map@100 and .* by top1"):
        main_metric(group_runs(runs))


@pytest.mark.parametrize(
    ("receipts", "share"),
    [
        ({"applied": 6, "accumulated": 2}, 0.0),
        ({"applied": 6, "stale": 1, "not_finite": 1}, 0.25),
        ({}, None),
    ],
)
def test_lost_is_what_is_neither_applied_nor_accumulated(tmp_path, receipts, share):
    assert lost_share(write_run(tmp_path / "run", receipts=receipts)) == share


def test_a_run_that_left_no_result_is_not_finished(tmp_path):
    folder = write_run(tmp_path / "run").path
    (folder / "result.json").unlink()
    run = read_run(folder)
    assert (run.status, run.finished) == ("unfinished", False)
    assert json.dumps(run.result) == "{}"
