"""Settings of [consistency]: what is refused and why, and what a policy asks of the others."""

import pytest
import torch

from asynception.plan import plan_model
from asynception.recipe import validate
from model.errors import InputError
from ps.consistency import Async, Averaging, Bounded, Sync
from ps.layout import Range, ShardRanges
from ps.rules import SGD, Ema, Momentum
from ps.schedule import Constant, Horizon
from ps.service import ShardService
from ps.shard import ShardConfig, initial_state

TREE = {
    "data": {"train": "/a", "val": "/b"},
    "training": {"epochs": 1},
    "scaling": {"num_workers": 3},
}


def policy(**given):
    return validate(TREE | {"consistency": given}).consistency


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, Async),
        ({"staleness_lr": True, "delay_compensation": 0.5, "max_staleness": 9}, Async),
        ({"mode": "bounded"}, Bounded),
        ({"mode": "bounded", "slack": 0, "staleness_lr": True}, Bounded),
        ({"mode": "sync", "deterministic": True}, Sync),
        ({"mode": "averaging", "local_steps": 8}, Averaging),
    ],
)
def test_modes(given, kind):
    assert type(policy(**given)) is kind


def test_every_option_is_off_by_default():
    assert Async().model_dump(exclude={"mode"}) == {
        "staleness_lr": False,
        "delay_compensation": None,
        "max_staleness": None,
        "ramp_up_epochs": 0.0,
    }
    assert not Sync().deterministic


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_staleness": 0, "staleness_lr": True}, r"staleness_lr = True has no effect with"),
        ({"max_staleness": 0, "delay_compensation": 1}, r"delay_compensation = 1.0 has no effect"),
        ({"delay_compensation": 0}, r"delay_compensation"),
        ({"ramp_up_epochs": -1}, r"ramp_up_epochs"),
        ({"mode": "bounded", "slack": -1}, r"slack"),
        ({"mode": "bounded", "max_staleness": 3}, r"max_staleness"),
        (
            {"mode": "sync", "deterministic": True, "backup_workers": 1},
            r"deterministic = true with consistency.backup_workers = 1: .*set backup_workers to 0",
        ),
        (
            {"mode": "averaging", "asynchronous": True, "outer_momentum": 0.9},
            r"outer_momentum = 0.9 .*set consistency.local_steps",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(given, said):
    with pytest.raises(InputError, match=said) as refusal:
        policy(**given)
    assert len(str(refusal.value).splitlines()) == 1


def test_who_goes_in_step_does_not_pull_ahead():
    ahead = TREE | {"pipeline": {"overlap": True}}
    with pytest.raises(InputError, match=r"pipeline.overlap = true .*consistency.slack = 0"):
        validate(ahead | {"consistency": {"mode": "bounded", "slack": 0}})
    validate(ahead | {"consistency": {"mode": "bounded", "slack": 1}})


def test_a_server_reserves_memory_for_what_the_policy_keeps():
    small = TREE | {"model": {"width": 0.05}, "data": TREE["data"] | {"image_size": 32}}

    def server_num_bytes(mode, **given):
        plan = plan_model(validate(small | {"consistency": {"mode": mode, **given}}), 3)
        return plan.server_num_bytes(0), 4 * plan.layout.shards[0].numel

    plain, vector = server_num_bytes("async")
    for given, more in (
        ({"mode": "async", "delay_compensation": 1}, 2 * 3),
        ({"mode": "bounded", "slack": 0}, 1),
        ({"mode": "sync"}, 1),
        ({"mode": "sync", "deterministic": True}, 3),
    ):
        assert server_num_bytes(**given)[0] - plain == more * vector


def test_workers_are_added_evenly_until_the_ramp_is_over():
    ramp = Async(ramp_up_epochs=3.0)
    assert [ramp.workers_at(epoch / 2, 4) for epoch in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert ramp.workers_at(0.0, 1) == 1
    assert {each.workers_at(0.0, 4) for each in (Async(), Bounded(), Sync(), Averaging())} == {4}


def test_what_modes_keep_in_memory():
    assert [each.num_sums(8) for each in (Async(), Bounded(), Sync(), Averaging())] == [0, 0, 1, 1]
    assert Sync(deterministic=True).num_sums(8) == 8
    assert [each.kept_versions(8) for each in (Async(), Sync(), Bounded(slack=1))] == [0, 0, 0]
    assert Async(delay_compensation=1).kept_versions(8) == 16
    assert Bounded(slack=0).kept_versions(8) == 1
    assert Bounded(slack=0, delay_compensation=1).kept_versions(8) == 17


def test_who_must_be_told_who_is_at_work():
    needs = [each.needs_roster for each in (Async(), Bounded(), Sync(), Averaging())]
    assert needs == [False, True, True, True]
    assert not Averaging(asynchronous=True).needs_roster


def test_servers_rules():
    momentum = Averaging(local_steps=1, outer_momentum=0.9)
    assert momentum.server_rule(SGD()) == Momentum(momentum=0.9, nesterov=True)
    delayed = momentum.model_copy(update={"asynchronous": True})
    assert tuple(delayed.server_rule(SGD(), 4).slots) == ("momentum", "gathered")
    with pytest.raises(AssertionError, match="number of workers"):
        delayed.server_rule(SGD())
    assert Bounded().server_rule(Momentum()) == Momentum()


def test_a_gradient_in_half_the_bytes_is_staged_in_the_same_memory():
    ranges = ShardRanges(Range(0, 33), Range(0, 2), ())
    horizon = Horizon(epoch_samples=100, num_workers=1)
    config = ShardConfig(ranges, SGD(), Constant(lr=1.0), horizon, Ema(), Async())
    service = ShardService(config)
    service.load(initial_state(SGD(), torch.zeros(33), torch.zeros(2)))
    with service.staging() as wide:
        memory = wide.gradient.data_ptr()
    with service.staging(torch.bfloat16) as narrow:
        assert (narrow.gradient.dtype, narrow.gradient.shape) == (torch.bfloat16, (33,))
        assert narrow.statistics_delta.dtype == torch.float32
        assert narrow.gradient.data_ptr() == memory
    with service.staging() as again:
        assert again is wide
