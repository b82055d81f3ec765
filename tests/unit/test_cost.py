"""Counts against ones made by hand, and against what autograd really keeps."""

import pytest
import torch
from torch import nn

from model.cost import measure_cost
from model.errors import InputError
from model.registry import create_model


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def test_counts_of_a_small_network():
    cost = measure_cost(small, 15)
    assert cost.num_parameters == 3 * 8 * 9 + 8 + 8 + 8 * 5 + 5
    assert cost.num_statistics == 16
    assert cost.num_wire_bytes == 4 * (cost.num_parameters + 16)
    assert cost.num_macs == 7 * 7 * 8 * 3 * 9 + 8 * 5
    # The convolution's output, for batch norm; its own, which ReLU works in; pooled features.
    maps = 4 * 8 * 7 * 7
    features, saved_statistics = 4 * 8, 4 * (8 + 8) // 2
    assert cost.num_activation_bytes == 2 * maps + features + saved_statistics


def test_the_papers_model():
    cost = measure_cost(lambda: create_model("xception", 1000), 299)
    assert (cost.num_parameters, cost.num_statistics) == (22_855_952, 54_528)
    head = 2048 * 1000
    assert round((cost.num_macs - head) / 1e9, 3) == 8.355


def test_activations_grow_with_the_image_and_parameters_do_not():
    def build():
        return create_model("xception", 10, width=0.1, middle_blocks=1)

    near, far = measure_cost(build, 64), measure_cost(build, 128)
    assert near.num_parameters == far.num_parameters
    assert 3.5 < far.num_activation_bytes / near.num_activation_bytes < 4.5
    assert 3.5 < far.num_macs / near.num_macs < 4.5


def test_a_size_that_vanishes_is_refused():
    with pytest.raises(InputError, match="make them at least 7x7"):
        measure_cost(lambda: create_model("xception", 10, width=0.1), 6)


def test_nothing_is_allocated():
    cost = measure_cost(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 4, 10**12)), 2)
    assert cost.num_parameters == 13 * 10**12
    assert not torch.empty(0).is_meta
