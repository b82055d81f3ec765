"""The recipes of the paper load, and say what the paper's tables say."""

import math
from pathlib import Path

import pytest

from asynception.info import describe
from asynception.plan import plan_model, plan_run
from asynception.recipe import load_config
from ps.rules import SGD
from ps.schedule import Clocks, Horizon

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

PARAMETERS = {
    "imagenet_xception_sync": 22_855_952,
    "imagenet_inception_v3_sync": 23_626_728,
    "jft_xception_async": 55_639_952,
    "jft_xception_fc_async": 115_629_968,
    "jft_inception_v3_async": 56_410_728,
    "jft_inception_v3_fc_async": 116_400_744,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_has_the_papers_settings(name):
    config = load_config(RECIPES / f"{name}.toml")
    is_imagenet, is_xception = name.startswith("imagenet"), "xception" in name
    assert config.optimizer.momentum == 0.9
    assert config.optimizer.weight_decay == (1e-5 if is_xception else 4e-5)
    assert config.optimizer.name == ("momentum" if is_imagenet else "rmsprop")
    assert config.schedule.lr == (0.045 if is_imagenet else 0.001)
    assert config.schedule.decay == (0.94 if is_imagenet else 0.9)
    assert config.schedule.every == (2 if is_imagenet else 3_000_000)
    assert config.model.settings.get("dropout", 0.0) == (0.5 if is_imagenet else 0.0)
    assert config.consistency.mode == ("sync" if is_imagenet else "async")
    assert config.training.objective == ("softmax" if is_imagenet else "multilabel")
    assert config.scaling.num_workers == 60


@pytest.mark.parametrize("name", PARAMETERS)
def test_info_shows_the_papers_figures(name):
    lines = dict(describe(load_config(RECIPES / f"{name}.toml")))
    assert lines["parameters"] == f"{PARAMETERS[name]:,}"
    if name.startswith("imagenet"):
        rates = [lines[f"learning rate at epoch {epoch}"] for epoch in (0, 10, 50, 100)]
        assert rates == [f"{0.045 * 0.94 ** (epoch // 2):.3g}" for epoch in (0, 10, 50, 100)]
    else:
        last = lines["learning rate at 350,000,000 samples"]
        assert last == "0.0009 with unit = worker_samples, 4.92e-09 with unit = samples"


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.startswith("imagenet")])
def test_imagenet_recipes_run_in_sync_and_in_averaging(name):
    recipe = RECIPES / f"{name}.toml"
    sync = load_config(recipe)
    averaging = load_config(
        recipe, ["--consistency.mode", "averaging", "--consistency.local_steps", "50"]
    )
    assert (sync.consistency.mode, averaging.consistency.mode) == ("sync", "averaging")
    assert (sync.batches_per_push, averaging.batches_per_push) == (1, 50)
    assert (sync.server_rule, averaging.server_rule) == (sync.optimizer, SGD())
    memory = [plan_model(config, 1000).worker_num_bytes() for config in (sync, averaging)]
    assert memory[0] < memory[1], "workers have optimizers of their own"


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.startswith("imagenet")])
def test_a_decay_step_in_sync_has_one_nth_of_the_updates(name):
    """Chen et al. 2016: the steps between two decays are divided by N."""
    config = load_config(RECIPES / f"{name}.toml")
    schedule, num_workers = config.schedule, config.scaling.num_workers
    batch, horizon = config.data.batch_size, Horizon(epoch_samples=1_281_167, num_workers=60)
    pushes = math.ceil(2 * horizon.epoch_samples / batch)
    updates = math.ceil(2 * horizon.epoch_samples / (num_workers * batch))
    assert updates == math.ceil(pushes / num_workers)
    for clocks in (Clocks(pushes, pushes * batch), Clocks(updates, updates * num_workers * batch)):
        before = Clocks(clocks.updates - 1, clocks.samples - clocks.samples // clocks.updates)
        assert schedule.rate(before, horizon) == 0.045
        assert schedule.rate(clocks, horizon) == 0.045 * 0.94


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_says_first_what_it_costs_and_reaches(path):
    assert path.read_text().startswith("# ")
    assert load_config(path).run.name.startswith(path.stem)


def test_fashion_mnist_is_read_with_its_classes():
    recipe = RECIPES / "fashion_mnist.toml"
    config = load_config(recipe)
    if not Path(config.data.train).is_file():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    plan = plan_run(config)
    assert (plan.train.num_samples, plan.train.num_classes) == (60_000, 10)
    assert plan.num_val_samples == 10_000
    assert plan.baseline["top1"] == pytest.approx(0.1)
