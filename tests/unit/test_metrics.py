"""What an evaluation reports, however it is split, and what it reports for the baseline."""

import math
import pickle
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.errors import InputError
from worker.data.labels import LabelLists
from worker.metrics import Metrics, create_metrics, frequency_baseline
from worker.objective import create_objective
from worker.ranking import MapDefinition

NUM_CLASSES = 8
levels = st.sampled_from([-3.5, 0.0, 2.0, 2.5])
rows = st.lists(levels, min_size=NUM_CLASSES, max_size=NUM_CLASSES)
label_sets = st.sets(st.integers(0, NUM_CLASSES - 1)).map(tuple)
images = st.lists(st.tuples(rows, label_sets), min_size=1, max_size=6)
Image = tuple[list[float], tuple[int, ...]]


def batch(images: Sequence[Image]) -> tuple[Tensor, LabelLists]:
    logits = torch.tensor([row for row, _ in images], dtype=torch.float32)
    return logits, LabelLists.from_lists([labels for _, labels in images])


def test_a_label_named_twice_counts_once() -> None:
    metrics = create_metrics("multilabel", MapDefinition(5))
    metrics.update(*batch([([1.0] + [0.0] * (NUM_CLASSES - 1), (0, 0))]), 0.0)
    assert metrics.compute() == {"map@5": 1.0, "loss": 0.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_type(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 0.25, -1.0]], dtype=dtype)
    metric = create_metrics("multilabel", MapDefinition(2))
    metric.update(logits, LabelLists.from_lists([[0]]), torch.tensor(1.5, dtype=dtype))
    assert metric.compute() == {"map@2": 0.5, "loss": 1.5}


@given(st.lists(images, min_size=1, max_size=5), st.permutations(range(5)), st.booleans())
@settings(deadline=None)
def test_any_split_over_evaluators_gives_the_same(
    parts: list[list[Image]], order: list[int], single: bool
) -> None:
    """Also for `softmax`, with some one label per image."""
    name = "softmax" if single else "multilabel"
    if single:
        parts = [[(row, (len(labels) % NUM_CLASSES,)) for row, labels in p] for p in parts]
    losses = [float(i) for i in range(len(parts))]
    definition = MapDefinition(3, torch.arange(NUM_CLASSES).float(), torch.arange(1, 6))
    whole, merged = create_metrics(name, definition), create_metrics(name, definition)
    for part, loss in zip(parts, losses, strict=True):
        whole.update(*batch(part), loss)
    for i in (i for i in order if i < len(parts)):
        evaluator = create_metrics(name, definition)
        evaluator.update(*batch(parts[i]), losses[i])
        merged.merge(pickle.loads(pickle.dumps(evaluator)))
    assert merged.compute() == pytest.approx(whole.compute(), nan_ok=True)
    sizes = [len(part) for part in parts]
    weighted = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
    assert whole.compute()["loss"] == pytest.approx(weighted)


@pytest.mark.parametrize(
    ("name", "keys"), [("multilabel", ["map@10", "loss"]), ("softmax", ["top1", "top5", "loss"])]
)
def test_nothing_seen_is_not_a_number(name: str, keys: list[str]) -> None:
    metrics = create_metrics(name, MapDefinition(10))
    metrics.update(torch.zeros(0, NUM_CLASSES), LabelLists.from_lists([]), math.nan)
    values = metrics.compute()
    assert list(values) == keys
    assert all(math.isnan(value) for value in values.values())
    metrics.update(torch.zeros(1, NUM_CLASSES), LabelLists.from_lists([[0]]), 2.5)
    assert metrics.compute()["loss"] == 2.5


def test_unlike_metrics_do_not_merge() -> None:
    three = create_metrics("multilabel", MapDefinition(3))
    for other in ("multilabel", "softmax"):
        with pytest.raises(AssertionError):
            three.merge(create_metrics(other, MapDefinition(4)))


def test_an_unknown_objective_has_no_metrics() -> None:
    with pytest.raises(InputError, match="objective='hinge'"):
        create_metrics("hinge", MapDefinition())


def dense_reference(
    name: str,
    probabilities: Tensor,
    lists: list[list[int]],
    definition: MapDefinition,
    weights: Tensor,
) -> Metrics:
    """One update with dense logits and a loss straight from the probabilities."""
    hot = torch.tensor([[float(i in row) for i in range(len(probabilities))] for row in lists])
    p = probabilities.double()
    if name == "multilabel":
        logits = (p / (1 - p)).log()
        loss = -(weights * (hot * p.log() + (1 - hot) * (1 - p).log())).sum(1).mean()
    else:
        logits = p.log()
        loss = (p.sum().log() - (hot * p.log()).sum(1)).mean()
    metrics = create_metrics(name, definition)
    metrics.update(logits.expand(len(lists), -1), LabelLists.from_lists(lists), loss)
    return metrics


DEFINITIONS = [
    MapDefinition(3),
    MapDefinition(2, torch.tensor([1.0, 0.0, 4.0, 2.0, 0.5]), torch.tensor([0, 1, 3])),
]


@pytest.mark.parametrize("definition", DEFINITIONS, ids=["plain", "weights and subset"])
@pytest.mark.parametrize("name", ["multilabel", "softmax"])
def test_the_baseline_predicts_training_frequencies(name: str, definition: MapDefinition) -> None:
    """By the same objective, label weights included, and the same definition of MAP@k."""
    counts = torch.tensor([0, 40, 3, 40, 100])
    size = 1 if name == "softmax" else 3
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randperm(5, generator=generator)[:size].tolist() for _ in range(600)]
    weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 3.0])
    objective = create_objective(name, 5, label_weights=weights if name == "multilabel" else None)
    found = frequency_baseline(objective, counts, 100, iter(lists), definition)
    frequencies = torch.tensor([0.005, 0.4, 0.03, 0.4, 0.995])
    expected = dense_reference(name, frequencies, lists, definition, weights).compute()
    assert found == pytest.approx(expected, rel=1e-5)
