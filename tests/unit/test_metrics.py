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
from worker.metrics import (
    MeanAveragePrecision,
    Metrics,
    TopKAccuracy,
    create_metrics,
    frequency_baseline,
)
from worker.objective import create_objective

NUM_CLASSES = 8
# Few levels, so that ties are common, with both zeros among them.
levels = st.sampled_from([-math.inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 2.0, 2.5, math.inf])
rows = st.lists(levels, min_size=NUM_CLASSES, max_size=NUM_CLASSES)
label_sets = st.sets(st.integers(0, NUM_CLASSES - 1)).map(tuple)
images = st.lists(st.tuples(rows, label_sets), min_size=1, max_size=6)
Image = tuple[list[float], tuple[int, ...]]


def ranking(logits: Sequence[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def average_precision(logits: Sequence[float], labels: Sequence[int], k: int) -> float:
    hits, total = 0, 0.0
    for rank, class_id in enumerate(ranking(logits)[:k], 1):
        if class_id in labels:
            hits += 1
            total += hits / rank
    return total / min(k, len(labels))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def batch(images: Sequence[Image]) -> tuple[Tensor, LabelLists]:
    logits = torch.tensor([row for row, _ in images], dtype=torch.float32)
    return logits, LabelLists.from_lists([labels for _, labels in images])


@given(images, st.integers(1, NUM_CLASSES + 3))
def test_average_precision_equals_brute_force(images: list[Image], k: int) -> None:
    metric = MeanAveragePrecision(k)
    metric.update(*batch(images))
    expected = mean([average_precision(row, labels, k) for row, labels in images if labels])
    assert metric.compute() == pytest.approx({f"map@{k}": expected}, nan_ok=True)


@given(st.data(), st.integers(1, NUM_CLASSES))
def test_a_perfect_ranking_scores_one(data: st.DataObject, k: int) -> None:
    labels = data.draw(label_sets.filter(bool))
    metric = MeanAveragePrecision(k)
    metric.update(*batch([([float(i in labels) for i in range(NUM_CLASSES)], labels)]))
    assert metric.compute() == {f"map@{k}": 1.0}


@given(st.lists(st.tuples(rows, st.integers(0, NUM_CLASSES - 1)), min_size=1, max_size=6))
def test_accuracy_equals_brute_force(images: list[tuple[list[float], int]]) -> None:
    metric = TopKAccuracy((1, 3, 20))
    metric.update(*batch([(row, (label,)) for row, label in images]))
    expected = {
        f"top{k}": mean([float(label in ranking(row)[:k]) for row, label in images])
        for k in (1, 3, 20)
    }
    assert metric.compute() == pytest.approx(expected)


@pytest.mark.parametrize("value", [math.nan, -math.nan])
def test_logits_that_are_not_numbers_score_nothing(value: float) -> None:
    good = [1.0] + [0.0] * (NUM_CLASSES - 1)
    diverged = [value] * NUM_CLASSES
    partly = [1.0] + [value] * (NUM_CLASSES - 1)
    images: list[Image] = [(good, (0,)), (diverged, (0,)), (partly, (0,)), (diverged, (7,))]
    precision, accuracy = MeanAveragePrecision(100), TopKAccuracy((1, 100))
    for metric in (precision, accuracy):
        metric.update(*batch(images))
    assert precision.compute() == {"map@100": 0.25}
    assert accuracy.compute() == {"top1": 0.25, "top100": 0.25}


def test_a_label_named_twice_counts_once() -> None:
    metric = MeanAveragePrecision(5)
    metric.update(*batch([([1.0] + [0.0] * (NUM_CLASSES - 1), (0, 0))]))
    assert metric.compute() == {"map@5": 1.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_type(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 0.25, -1.0]], dtype=dtype)
    metric = create_metrics("multilabel", 2)
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
    whole, merged = create_metrics(name, 3), create_metrics(name, 3)
    for part, loss in zip(parts, losses, strict=True):
        whole.update(*batch(part), loss)
    for i in (i for i in order if i < len(parts)):
        evaluator = create_metrics(name, 3)
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
    metrics = create_metrics(name, 10)
    metrics.update(torch.zeros(0, NUM_CLASSES), LabelLists.from_lists([]), math.nan)
    values = metrics.compute()
    assert list(values) == keys
    assert all(math.isnan(value) for value in values.values())
    metrics.update(torch.zeros(1, NUM_CLASSES), LabelLists.from_lists([[0]]), 2.5)
    assert metrics.compute()["loss"] == 2.5


def test_unlike_metrics_do_not_merge() -> None:
    with pytest.raises(AssertionError):
        create_metrics("multilabel", 3).merge(create_metrics("multilabel", 4))
    with pytest.raises(AssertionError):
        create_metrics("multilabel").merge(create_metrics("softmax"))


def test_unusable_requests_are_refused() -> None:
    with pytest.raises(InputError, match="objective='hinge'"):
        create_metrics("hinge")
    with pytest.raises(InputError, match="one label per image"):
        TopKAccuracy((1,)).update(torch.zeros(1, 3), LabelLists.from_lists([[0, 1]]))


def dense_reference(name: str, probabilities: Tensor, lists: list[list[int]]) -> Metrics:
    """One update with dense logits and a loss straight from the probabilities."""
    hot = torch.tensor([[float(i in row) for i in range(len(probabilities))] for row in lists])
    p = probabilities.double()
    if name == "multilabel":
        logits = (p / (1 - p)).log()
        loss = -(hot * p.log() + (1 - hot) * (1 - p).log()).sum(1).mean()
    else:
        logits = p.log()
        loss = (p.sum().log() - (hot * p.log()).sum(1)).mean()
    metrics = create_metrics(name, 3)
    metrics.update(logits.expand(len(lists), -1), LabelLists.from_lists(lists), loss)
    return metrics


@pytest.mark.parametrize("name", ["multilabel", "softmax"])
def test_the_baseline_predicts_training_frequencies(name: str) -> None:
    counts = torch.tensor([0, 40, 3, 40, 100])
    size = 1 if name == "softmax" else 3
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randperm(5, generator=generator)[:size].tolist() for _ in range(600)]
    found = frequency_baseline(create_objective(name, 5), counts, 100, iter(lists), k=3)
    frequencies = torch.tensor([0.005, 0.4, 0.03, 0.4, 0.995])
    expected = dense_reference(name, frequencies, lists).compute()
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_metric_is_feasible_at_the_size_of_jft() -> None:
    """14,000 x 17,000 logits go in batches; one batch equals its rows taken one by one."""
    logits = torch.randn(32, 17_000, generator=torch.Generator().manual_seed(0))
    lists = [list(range(i, 17_000, 470)) for i in range(32)]
    together, apart = MeanAveragePrecision(100), MeanAveragePrecision(100)
    together.update(logits, LabelLists.from_lists(lists))
    for row, labels in zip(logits, lists, strict=True):
        apart.update(row[None], LabelLists.from_lists([labels]))
    assert together.compute() == pytest.approx(apart.compute())
    expected = mean([average_precision(logits[i].tolist(), lists[i], 100) for i in range(32)])
    assert together.compute()["map@100"] == pytest.approx(expected)
