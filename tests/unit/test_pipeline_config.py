"""Which pipelines a recipe may ask for."""

import re

import pytest

from asynception.recipe import validate
from model.errors import InputError

DATA = {"train": "/a", "val": "/b"}


def config_of(sections):
    training = {"epochs": 1, **sections.pop("training", {})}
    return validate({"data": DATA, "training": training, **sections})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"consistency": {"mode": "sync"}, "pipeline": {"overlap": True}}, "pipeline.overlap"),
        ({"consistency": {"mode": "sync"}, "pipeline": {"early_push": True}}, 'mode = "sync"'),
        ({"consistency": {"mode": "averaging"}, "pipeline": {"overlap": True}}, "pipeline.overlap"),
        (
            {"training": {"clip_norm": 2.0}, "pipeline": {"early_push": True}},
            "training.clip_norm = 2.0",
        ),
        (
            {"training": {"accumulate_grad_batches": 4}, "pipeline": {"early_push": True}},
            "training.accumulate_grad_batches = 4",
        ),
        (
            {"training": {"accumulate_grad_batches": 4}, "consistency": {"mode": "averaging"}},
            "consistency.local_steps",
        ),
    ],
)
def test_what_can_have_no_effect_is_refused(sections, said):
    with pytest.raises(InputError, match=re.escape(said)):
        config_of(sections)


def test_batches_behind_a_push_are_those_of_gradients_or_of_local_steps():
    accumulated = config_of({"training": {"accumulate_grad_batches": 4}})
    assert accumulated.batches_per_push == 4
    overlapped = {"pipeline": {"overlap": True}, "training": {"accumulate_grad_batches": 2}}
    assert config_of(overlapped).batches_per_push == 2
    assert config_of({"consistency": {"mode": "averaging", "local_steps": 7}}).batches_per_push == 7
    assert config_of({"consistency": {"mode": "averaging"}}).batches_per_push is None
