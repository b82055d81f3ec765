"""The head: pool, hidden layers, dropout, logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import InputError
from model.head import Head, HeadSettings
from model.registry import check_settings


def test_head_averages_over_the_map() -> None:
    head = Head(3, 2, HeadSettings())
    maps = torch.randn(4, 3, 5, 6)
    expected = F.linear(maps.sum(dim=(2, 3)) / 30, head.dense.weight, head.dense.bias)
    torch.testing.assert_close(head(maps), expected)


def test_dropout_acts_on_features_and_only_in_training() -> None:
    torch.manual_seed(0)
    head = Head(1000, 1000, HeadSettings(dropout=0.25))
    nn.init.eye_(head.dense.weight)
    nn.init.zeros_(head.dense.bias)
    maps = torch.ones(1, 1000, 2, 2)
    trained = head.train()(maps)
    dropped = trained == 0
    torch.testing.assert_close(trained[~dropped], torch.full_like(trained[~dropped], 1 / 0.75))
    assert 0.2 < dropped.float().mean().item() < 0.3
    assert torch.equal(head.eval()(maps), torch.ones(1, 1000))


def test_hidden_layers_have_biases_and_relu() -> None:
    torch.manual_seed(0)
    head = Head(6, 3, HeadSettings(fc_widths=(5, 4)))
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    maps = torch.randn(7, 6, 2, 3)
    tensors = dict(head.named_parameters())
    assert list(tensors) == [
        f"{n}.{k}" for n in ("fc1", "fc2", "dense") for k in ("weight", "bias")
    ]
    features = maps.flatten(2).mean(2)
    for name in ("fc1", "fc2"):
        features = (features @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]).clamp(min=0)
    expected = features @ tensors["dense.weight"].T + tensors["dense.bias"]
    torch.testing.assert_close(head(maps), expected)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_comes_before_the_last_layer_alone(training: bool) -> None:
    torch.manual_seed(0)
    head = Head(400, 3, HeadSettings(fc_widths=(400, 400), dropout=0.5)).train(training)
    for hidden in (head.fc1, head.fc2):
        nn.init.eye_(hidden.weight)
        nn.init.ones_(hidden.bias)
    taken: dict[str, Tensor] = {}
    for name in ("fc1", "fc2", "dense"):
        head.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: taken.update({name: inputs[0].clone()})
        )
    head(torch.ones(2, 400, 2, 2))
    assert taken["fc1"].eq(1).all()
    assert taken["fc2"].eq(2).all()
    if training:
        # The kept half is doubled, so that the mean stays what it is in evaluation.
        assert set(taken["dense"].unique().tolist()) == {0.0, 6.0}
        assert 0.4 < taken["dense"].eq(0).float().mean().item() < 0.6
    else:
        assert taken["dense"].eq(3).all()


@pytest.mark.parametrize("num_classes", [0, -1])
def test_no_classes_are_refused(num_classes: int) -> None:
    with pytest.raises(InputError, match=f"num_classes = {num_classes} "):
        Head(8, num_classes, HeadSettings())


@pytest.mark.parametrize(
    ("fc_widths", "shown"), [([0], "fc_widths.0 = 0 "), ((4096, -1), "fc_widths.1 = -1 ")]
)
def test_layers_without_width_are_refused_in_one_line(fc_widths, shown: str) -> None:
    with pytest.raises(InputError, match=shown) as caught:
        check_settings("xception", {"fc_widths": fc_widths})
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("greater than 0")
