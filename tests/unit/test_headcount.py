"""How many workers a run may have, and which of them stay when their number changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynception.config import TrainConfig
from asynception.headcount import check_count, places_for
from asynception.recipe import load_config, parse_overrides, validate
from model.errors import InputError

PLACES = st.frozensets(st.integers(0, 7))


def config(num_workers: object, mode: str = "async", **settings: object) -> TrainConfig:
    tree = {
        "data": {"train": "none", "val": "none"},
        "training": {"epochs": 1},
        "consistency": {"mode": mode},
        "scaling": {"num_workers": num_workers},
    }
    return validate({**tree, **settings})


@given(st.integers(1, 8), PLACES, st.frozensets(st.integers(0, 7)))
def test_who_works_stays_and_places_are_used_again(num_workers, before, at_work):
    places = places_for(num_workers, before, at_work)
    assert len(places) == num_workers
    assert max(places) < max(8, num_workers)
    if num_workers >= len(before):
        assert before <= places
        assert places - before == set(sorted(set(range(16)) - before)[: num_workers - len(before)])
    else:
        assert places < before
        given_up, kept_idle = before - places, places - at_work
        assert not (kept_idle and given_up & at_work), "who works goes before who waits"


@given(st.integers(1, 5), st.data())
def test_a_place_is_never_beyond_the_most_that_servers_are_planned_for(most, data):
    """Whatever orders come one after another."""
    places = frozenset(range(most))
    for num_workers in data.draw(st.lists(st.integers(1, most), max_size=6)):
        places = places_for(
            num_workers, places, data.draw(st.frozensets(st.sampled_from(range(9))))
        )
        assert len(places) == num_workers
        assert max(places) < most


@pytest.mark.parametrize("given", [[2, 6], (2, 6), "2,6", "[2, 6]"])
def test_a_range_is_given_in_a_recipe_or_on_the_command_line(given):
    tree = parse_overrides(["--scaling.num_workers", str(given)]) if isinstance(given, str) else {}
    scaling = config(tree["scaling"]["num_workers"] if tree else given).scaling
    assert (scaling.is_range, scaling.min_workers, scaling.max_workers) == (True, 2, 6)
    one = config(3).scaling
    assert (one.is_range, one.min_workers, one.max_workers) == (False, 3, 3)


def test_a_range_is_kept_with_the_run(tmp_path):
    from asynception.recipe import save_config
    from asynception.run_files import CONFIG_FILE

    save_config(config([1, 4]), tmp_path)
    assert "num_workers = [\n    1,\n    4,\n]" in (tmp_path / CONFIG_FILE).read_text()
    assert load_config(tmp_path).scaling.num_workers == (1, 4)


@pytest.mark.parametrize("wrong", [0, -1, [0, 3], [3, 2], [1, 2, 3], [], "x", "1,x", 1.5, True])
def test_other_counts_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=r"scaling\.num_workers = .*: .*give"):
        config(wrong)


@pytest.mark.parametrize("mode", ["sync", "averaging", "allreduce"])
def test_where_updates_depend_on_their_number_it_stays(mode):
    with pytest.raises(InputError, match=r"\[1, 2\] .*it may not change: give one number"):
        config([1, 2], mode)
    with pytest.raises(InputError, match=r"--num-workers 1 .*it stays as it is"):
        check_count(config(2, mode), 1)


@pytest.mark.parametrize("mode", ["async", "bounded", "elastic"])
def test_elsewhere_it_may_change_up_to_what_servers_are_planned_for(mode):
    several = config([2, 4], mode)
    for num_workers in (1, 2, 4):
        check_count(several, num_workers)
    with pytest.raises(InputError, match=r"4 at most; .*--scaling.num_workers 2,5"):
        check_count(several, 5)
    with pytest.raises(InputError, match="nobody would train"):
        check_count(several, 0)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"schedule": {"kind": "constant", "lr": 1.0, "unit": "worker_samples"}}, "schedule.unit"),
        ({"scaling": {"num_workers": [1, 2], "placement_strategy": "STRICT_PACK"}}, "placement"),
        ({"scaling": {"num_workers": [1, 2], "slow_workers": {2: 3.0}}}, "slow_workers"),
    ],
)
def test_what_does_not_go_with_a_range_is_refused(settings, names):
    with pytest.raises(InputError, match=rf"{names}.*\[1, 2\]"):
        config([1, 2], **settings)


def test_the_centre_is_stable_for_the_most_workers():
    elastic = {"consistency": {"mode": "elastic", "moving_rate": 0.3}}
    with pytest.raises(InputError, match=r"scaling\.num_workers = 4"):
        config([1, 4], **elastic)
    assert config([1, 3], **elastic).scaling.max_workers == 3
