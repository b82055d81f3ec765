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


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"consistency": {"mode": "averaging"}}, 'consistency.mode = "averaging"'),
        ({"consistency": {"mode": "allreduce"}}, "scaling.num_workers to 4 times as many"),
        ({"pipeline": {"early_push": True}}, "pipeline.early_push = true"),
        (
            {"scaling": {"use_gpu": True, "resources_per_worker": {"GPU": 2}}},
            "scaling.resources_per_worker.GPU = 2 can't be shared evenly",
        ),
        (
            {"scaling": {"use_gpu": True, "resources_per_worker": {"GPU": 6}}},
            "set it to 4, or the processes to 6",
        ),
    ],
)
def test_processes_of_a_worker_are_refused_where_they_make_no_gradient_together(sections, said):
    scaling = {"processes_per_worker": 4, **sections.pop("scaling", {})}
    with pytest.raises(InputError, match=re.escape(said)) as refused:
        config_of({"scaling": scaling, **sections})
    assert "scaling.processes_per_worker = 4" in str(refused.value)


@pytest.mark.parametrize("mode", ["async", "bounded", "sync"])
def test_a_push_holds_the_batches_of_all_processes(mode):
    config = config_of(
        {
            "consistency": {"mode": mode},
            "scaling": {"processes_per_worker": 4},
            "training": {"accumulate_grad_batches": 2},
            "pipeline": {"overlap": mode != "sync"},
            "security": {"tls": "auto"},
        }
    )
    assert (config.batches_per_process, config.batches_per_push) == (2, 8)


@pytest.mark.parametrize(
    ("given", "worker", "process"),
    [
        ({}, {"CPU": 4.0, "GPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}),
        (
            {"CPU": 18, "memory": 1e9, "rack": 1},
            {"CPU": 18.0, "GPU": 4.0, "memory": 1e9, "rack": 1.0},
            {"CPU": 4.0, "GPU": 1.0, "memory": 2.5e8, "rack": 0.25},
        ),
    ],
)
def test_processes_share_what_a_worker_gets(given, worker, process):
    scaling = {"processes_per_worker": 4, "use_gpu": True, "resources_per_worker": given}
    config = config_of({"scaling": scaling}).scaling
    assert (config.worker_resources, config.process_resources) == (worker, process)
