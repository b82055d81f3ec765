"""Weights from a file: by name, all or nothing, and only the last layer may stay behind."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.errors import InputError
from model.flat import FlatModule
from model.registry import create_model
from model.weights import load_weights

SETTINGS = {"width": 0.05, "middle_blocks": 1}
COUNTER = "num_batches_tracked"


def build(num_classes: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("xception", num_classes, **SETTINGS)


def random_state(num_classes: int = 4) -> dict[str, Tensor]:
    """Every tensor differs from what a new model has, the counters as well."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randint(1, 100, tensor.shape, generator=generator)
        if name.endswith(COUNTER)
        else torch.randn(tensor.shape, generator=generator)
        for name, tensor in build(num_classes).state_dict().items()
    }


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    path = folder / "weights.safetensors"
    save_file(state, path)
    return path


def refusal(module: nn.Module, path: Path) -> str:
    """The one line of a refusal that leaves the module as it was."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(module, path)
    assert all(torch.equal(before[name], now) for name, now in module.state_dict().items())
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def test_every_tensor_comes_from_the_file(tmp_path):
    state, module = random_state(), build()
    assert load_weights(module, write(tmp_path, state)) == ()
    loaded = module.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_the_counters_of_batch_norm_may_be_missing(tmp_path):
    state = {name: t for name, t in random_state().items() if not name.endswith(COUNTER)}
    module = build()
    assert load_weights(module, write(tmp_path, state)) == ()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name]) if name in state else tensor == 0


def test_another_number_of_classes_leaves_the_whole_last_layer_as_it_was(tmp_path):
    state, module, fresh = random_state(7), build(), build().state_dict()
    left = load_weights(module, write(tmp_path, state))
    assert left == ("head.dense.weight", "head.dense.bias")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in left else state[name]), name


@pytest.mark.parametrize("last", ["fc", "classifier.6"])
def test_torchvision_names_its_last_layers_otherwise(tmp_path, last):
    def network(num_classes: int) -> nn.Module:
        parts = [nn.Identity()] * 6 + [nn.Linear(3, num_classes)]
        dense = nn.Sequential(*parts) if "." in last else parts[-1]
        return nn.ModuleDict({"conv": nn.Conv2d(3, 3, 1), last.partition(".")[0]: dense})

    other, module = network(5), network(2)
    path = write(tmp_path, other.state_dict())
    assert load_weights(module, path) == (f"{last}.weight", f"{last}.bias")
    assert torch.equal(module["conv"].weight, other["conv"].weight)


def test_a_last_layer_is_never_taken_in_half(tmp_path):
    def network(num_features: int) -> nn.Module:
        return nn.ModuleDict({"conv": nn.Conv2d(3, 3, 1), "fc": nn.Linear(num_features, 2)})

    module = network(3)
    before = module["fc"].bias.clone()
    left = load_weights(module, write(tmp_path, network(4).state_dict()))
    assert left == ("fc.weight", "fc.bias")
    assert torch.equal(module["fc"].bias, before)


def test_numbers_are_converted_to_the_models_type(tmp_path):
    state, module = random_state(), build()
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    load_weights(module, write(tmp_path, half))
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, half[name].to(tensor.dtype))


def test_a_flattened_module_stays_in_its_vectors(tmp_path):
    state, flat = random_state(), FlatModule(build())
    load_weights(flat.module, write(tmp_path, state))
    flat.check_views()
    first = flat.parameter_segments[0]
    stored = flat.parameters[first.offset : first.stop].view(first.shape)
    assert torch.equal(stored, state[first.name])


def test_a_module_without_values_learns_whether_the_file_fits(tmp_path):
    with torch.device("meta"):
        module = create_model("xception", 4, **SETTINGS)
    assert load_weights(module, write(tmp_path, random_state())) == ()
    state = random_state()
    del state["block1.conv1.weight"]
    with pytest.raises(InputError):
        load_weights(module, write(tmp_path, state))


@pytest.mark.parametrize(
    "name", ["block1.conv1.weight", "block3.bn1.running_var", "head.dense.bias"]
)
def test_a_missing_tensor_is_named(tmp_path, name):
    state = random_state()
    del state[name]
    assert repr(name) in refusal(build(), write(tmp_path, state))


def test_a_missing_tensor_of_a_last_layer_that_differs_is_named_as_well(tmp_path):
    state = random_state(7)
    del state["head.dense.bias"]
    assert "'head.dense" in refusal(build(), write(tmp_path, state))


def test_a_tensor_too_many_is_named(tmp_path):
    state = random_state() | {"block9.conv.weight": torch.zeros(1)}
    assert "'block9.conv.weight'" in refusal(build(), write(tmp_path, state))


@pytest.mark.parametrize("shape", [(8, 3, 3, 1), (8, 27), ()])
def test_another_shape_elsewhere_is_named_with_both_shapes(tmp_path, shape):
    state = random_state() | {"block1.conv1.weight": torch.zeros(shape)}
    text = refusal(build(), write(tmp_path, state))
    assert "'block1.conv1.weight'" in text
    assert str(shape) in text
    assert "(8, 3, 3, 3)" in text


def test_another_kind_of_numbers_is_named(tmp_path):
    state = random_state() | {"block1.bn1.weight": torch.zeros(8, dtype=torch.int8)}
    text = refusal(build(), write(tmp_path, state))
    assert "'block1.bn1.weight'" in text
    assert "torch.int8" in text


@pytest.mark.parametrize("content", [None, b"", b"no safetensors"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    refusal(build(), path)


def test_a_folder_is_no_file(tmp_path):
    refusal(build(), tmp_path)
