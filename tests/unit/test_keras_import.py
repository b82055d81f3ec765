"""`asynception import-keras`: from a file of Keras's to one that a run can start from."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file

from asynception.cli import main
from model.keras_layers import keras_layers
from model.keras_weights import load_keras_weights
from model.registry import create_model
from model.weights import load_weights

NUM_CLASSES = 5


def keras_arrays(name: str) -> list[np.ndarray]:
    """Random weights of a model, in the order and shapes of Keras's `get_weights()`."""
    generator = np.random.default_rng(0)
    with torch.device("meta"):
        layers = keras_layers(create_model(name, NUM_CLASSES))
    shapes = [weight.keras_shape for layer in layers for weight in layer.weights]
    return [generator.random(shape, np.float32) for shape in shapes]


def write_h5(path: Path, arrays: list[np.ndarray]) -> Path:
    """One layer that holds everything; Keras would name more."""
    names = [f"array_{index}" for index in range(len(arrays))]
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["all"]
        layer = file.create_group("all")
        layer.attrs["weight_names"] = names
        for name, array in zip(names, arrays, strict=True):
            layer[name] = array
    return path


def call(*arguments: object) -> Result:
    words = ["import-keras", *(str(each) for each in arguments)]
    return CliRunner().invoke(main, words, catch_exceptions=False)


def refusal(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1, result.output
    return result.output


@pytest.mark.parametrize("name", ["xception", "inception_v3", "inception_v3_2016"])
def test_a_run_can_start_from_what_was_imported(tmp_path, name):
    arrays = keras_arrays(name)
    file, out = write_h5(tmp_path / "keras.h5", arrays), tmp_path / "model.safetensors"
    result = call(file, "--model", name, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"{NUM_CLASSES} classes" in result.output

    expected = create_model(name, NUM_CLASSES)
    load_keras_weights(expected, arrays)
    loaded = create_model(name, NUM_CLASSES)
    assert load_weights(loaded, out) == ()
    state = load_file(out)
    assert state.keys() == expected.state_dict().keys()
    own = loaded.state_dict()
    for each, tensor in expected.state_dict().items():
        assert torch.equal(state[each], tensor), each
        assert torch.equal(own[each], tensor), each

    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["model"] == name
    assert json.loads(metadata["settings"]) == {}
    assert metadata["num_classes"] == str(NUM_CLASSES)
    assert set(os.listdir(tmp_path)) == {"keras.h5", "model.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.h5", "--model", "xception", "--out", "out"], "gone.h5"),
        (["text.h5", "--model", "xception", "--out", "out"], "text.h5"),
        (["none.h5", "--model", "xception", "--out", "out"], "0 arrays"),
        (["none.h5", "--model", "xeption", "--out", "out"], "'xeption'"),
    ],
)
def test_a_mistake_gets_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("text.h5").write_text("no HDF5")
    write_h5(Path("none.h5"), [])
    assert says in refusal(*arguments)
    assert not Path("out").exists()


def test_weights_without_their_last_layer_are_refused(tmp_path):
    file = write_h5(tmp_path / "notop.h5", keras_arrays("xception")[:-2])
    text = refusal(file, "--model", "xception", "--out", tmp_path / "out")
    assert "include_top" in text


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    file = write_h5(tmp_path / "keras.h5", keras_arrays("xception"))
    text = refusal(file, "--model", "xception", "--out", tmp_path / "gone" / "out")
    assert f"--out {tmp_path / 'gone' / 'out'}" in text
