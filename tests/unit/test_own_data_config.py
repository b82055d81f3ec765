"""A data set of one's own in the config: its text is read once, and kept with the run."""

import pickle

import pytest

from asynception.building import open_train, open_val
from asynception.config import TrainConfig
from asynception.recipe import load_config, save_config
from model.errors import InputError
from worker.data.open import open_source
from worker.data.source import iterate_labels

TEXT = """
import numpy as np

def make(split):
    image = np.zeros((8, 8, 3), np.uint8)
    return [(image, label) for label in ((0, 1, 2) if split == "train" else (3,))]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(TEXT)
    return path


def config_of(file):
    data = {"train": f"{file}:make", "val": f"{file}:make", "image_size": 8}
    return TrainConfig.model_validate({"data": data, "training": {"epochs": 1}})


def labels(config):
    return [list(iterate_labels(source)) for source in (open_train(config), open_val(config))]


def test_each_split_is_opened_from_the_text_as_it_was_read(file):
    config = config_of(file)
    sent = pickle.dumps(config)
    file.write_text("raise SystemError('changed since')")
    received = pickle.loads(sent)
    file.unlink()
    assert received == config
    assert labels(received) == [[(0,), (1,), (2,)], [(3,)]]


def test_a_run_keeps_the_files_of_its_data_sets(file, tmp_path):
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    save_config(config_of(file), run)
    file.unlink()
    moved = run.rename(tmp_path / "moved")
    config = load_config(moved)
    assert config.data.train == f"{moved}/train_dataset.py:make"
    assert labels(config) == [[(0,), (1,), (2,)], [(3,)]]
    save_config(config, moved)
    assert load_config(moved) == config


def test_a_path_in_a_recipe_starts_at_its_folder(file, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\ntrain = "mine.py:make"\nval = "a.tar"\n[training]\nepochs = 1\n')
    config = load_config(recipe)
    assert config.data.train == f"{file}:make"
    assert list(config.data.functions) == ["train"]
    with pytest.raises(InputError, match=r"data\.val = .*absent\.py:make' can't be read"):
        load_config(recipe, ["--data.val", f"{tmp_path}/absent.py:make"])


def test_a_file_can_be_opened_without_a_config(file):
    source = open_source(f"{file}:make", setting="data.val")
    assert list(iterate_labels(source)) == [(3,)]
