"""MAP@k and accuracy against brute force, and against scikit-learn where they mean the same."""

import math
import pickle
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import label_ranking_average_precision_score
from torch import Tensor

from model.errors import InputError
from worker.data.labels import LabelLists
from worker.ranking import MapDefinition, MeanAveragePrecision, TopKAccuracy

NUM_CLASSES = 8
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
class_ids = st.integers(0, NUM_CLASSES - 1)
# Few levels, so that ties are common, with both zeros among them.
levels = st.sampled_from([-math.inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 2.0, 2.5, math.inf])
rows = st.lists(levels, min_size=NUM_CLASSES, max_size=NUM_CLASSES)
# A class may be named twice.
label_lists = st.lists(class_ids, max_size=NUM_CLASSES).map(tuple)
images = st.lists(st.tuples(rows, label_lists), min_size=1, max_size=6)
Image = tuple[list[float], tuple[int, ...]]
# Few weights, so that zeros and equal ones are common.
weights = st.lists(
    st.sampled_from([0.0, 0.5, 1.0, 1.0, 7.25]), min_size=NUM_CLASSES, max_size=NUM_CLASSES
).filter(any)
subsets = st.sets(class_ids, min_size=1).map(sorted)
ks = st.integers(1, NUM_CLASSES + 3)


def ranking(logits: Sequence[float], classes: Sequence[int]) -> list[int]:
    return sorted(classes, key=lambda i: (-logits[i], i))


def average_precision(
    logits: Sequence[float],
    labels: Sequence[int],
    k: int,
    weights: Sequence[float] | None = None,
    classes: Sequence[int] | None = None,
) -> float | None:
    """AP@k of one image; None if it doesn't count."""
    weights = [1.0] * len(logits) if weights is None else weights
    classes = list(range(len(logits))) if classes is None else classes
    inside = set(labels) & set(classes)
    best = sum(sorted((weights[i] for i in inside), reverse=True)[:k])
    if best == 0:
        return None
    hits, total = 0, 0.0
    for rank, class_id in enumerate(ranking(logits, classes)[:k], 1):
        if class_id in inside:
            hits += 1
            total += weights[class_id] * hits / rank
    return total / best


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def batch(images: Sequence[Image]) -> tuple[Tensor, LabelLists]:
    logits = torch.tensor([row for row, _ in images], dtype=torch.float32)
    return logits, LabelLists.from_lists([labels for _, labels in images])


def definition(
    k: int, weights: Sequence[float] | None = None, classes: Sequence[int] | None = None
) -> MapDefinition:
    return MapDefinition(
        k,
        None if weights is None else torch.tensor(weights),
        None if classes is None else torch.tensor(classes),
    )


def mean_average_precision(images: Sequence[Image], of: MapDefinition) -> float:
    metric = MeanAveragePrecision(of)
    metric.update(*batch(images))
    return metric.compute()[f"map@{of.k}"]


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=300)
@given(images, ks, st.none() | weights, st.none() | subsets)
def test_average_precision_equals_brute_force(device, images, k, weights, classes) -> None:
    metric = MeanAveragePrecision(definition(k, weights, classes))
    logits, labels = batch(images)
    metric.update(logits.to(device), labels)
    scores = [average_precision(row, labels, k, weights, classes) for row, labels in images]
    expected = mean([score for score in scores if score is not None])
    assert metric.compute() == pytest.approx({f"map@{k}": expected}, nan_ok=True)


@settings(deadline=None)
@given(st.data(), ks, weights, subsets)
def test_labels_first_and_heaviest_first_score_one(data, k, weights, classes) -> None:
    inside = [i for i in classes if weights[i]]
    labels = data.draw(st.sets(st.sampled_from(inside), min_size=1)) if inside else {0}
    row = [100 + weights[i] if i in labels else float(i) for i in range(NUM_CLASSES)]
    found = mean_average_precision([(row, tuple(labels))], definition(k, weights, classes))
    assert found == pytest.approx(1) if inside else math.isnan(found)


@settings(deadline=None)
@given(images, ks, st.sampled_from([0.25, 1.0, 6.0]))
def test_equal_weights_and_all_classes_change_nothing(images, k, weight) -> None:
    plain = mean_average_precision(images, definition(k))
    same = definition(k, [weight] * NUM_CLASSES, list(range(NUM_CLASSES)))
    assert mean_average_precision(images, same) == pytest.approx(plain, nan_ok=True)


@settings(deadline=None)
@given(images, ks, weights, subsets)
def test_nothing_scores_more_than_one(images, k, weights, classes) -> None:
    found = mean_average_precision(images, definition(k, weights, classes))
    assert math.isnan(found) or 0 <= found <= 1 + 1e-12


def row_of(*best: int) -> list[float]:
    """Logits that rank these classes first, in this order."""
    return [-float(best.index(i)) if i in best else -100.0 - i for i in range(NUM_CLASSES)]


WEIGHTS = [4.0, 0.0, 2.0, 1.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("row", "labels", "of", "expected"),
    [
        (row_of(0, 2), (), definition(3), None),
        (row_of(0, 2), (0, 2), definition(3, classes=[3, 4]), None),
        (row_of(1, 4), (1, 4), definition(3, WEIGHTS), None),
        # A miss between them costs more where the heavier label comes last.
        (row_of(0, 5, 2), (0, 2), definition(3, WEIGHTS), (4 + 2 * 2 / 3) / 6),
        (row_of(2, 5, 0), (0, 2), definition(3, WEIGHTS), (2 + 4 * 2 / 3) / 6),
        # Only the k heaviest of more labels can be had.
        (row_of(2, 3), (0, 2, 3), definition(2, WEIGHTS), (2 + 1) / 6),
        # A class of weight 0 takes its rank, and counts in precision where it is a label.
        (row_of(1, 0), (0,), definition(3, WEIGHTS), 1 / 2),
        (row_of(1, 0), (0, 1), definition(3, WEIGHTS), 1.0),
        # What is outside the subset takes no rank, and is no label.
        (row_of(1, 0), (0,), definition(3, WEIGHTS, [0, 2, 3]), 1.0),
        (row_of(1, 3, 0), (0, 1), definition(3, WEIGHTS, [0, 2, 3]), 1 / 2),
        # Ties go by class id.
        ([0.0] * NUM_CLASSES, (1,), definition(3), 1 / 2),
        ([0.0] * NUM_CLASSES, (3,), definition(3), 0.0),
        ([0.0] * NUM_CLASSES, (3,), definition(3, classes=[2, 3, 7]), 1 / 2),
        # More ranks than classes.
        (row_of(3, 2), (2,), definition(5, classes=[2, 3]), 1 / 2),
    ],
)
def test_the_edges_of_the_definition(row, labels, of, expected) -> None:
    metric = MeanAveragePrecision(of)
    metric.update(*batch([(row, labels)]))
    assert metric._num_images == (expected is not None)
    wanted = math.nan if expected is None else expected
    assert metric.compute()[f"map@{of.k}"] == pytest.approx(wanted, nan_ok=True)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(2, 40), st.integers(0, 3))
def test_all_ranks_are_label_ranking_average_precision(seed, num_images, num_classes, more) -> None:
    """The same without ties, weights and images without labels, and with k >= classes."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_images, num_classes, generator=generator).argsort(1)
    logits = order / 4 - 3
    hot = torch.rand(num_images, num_classes, generator=generator) < 0.3
    hot[:, seed % num_classes] = True
    lists = [row.nonzero().ravel().tolist() for row in hot]
    metric = MeanAveragePrecision(definition(num_classes + more))
    metric.update(logits, LabelLists.from_lists(lists))
    (found,) = metric.compute().values()
    assert found == pytest.approx(label_ranking_average_precision_score(hot, logits))


@settings(deadline=None)
@given(st.lists(images, min_size=1, max_size=4), st.permutations(range(4)), weights, subsets)
def test_any_split_over_evaluators_gives_the_same(parts, order, weights, classes) -> None:
    of = definition(3, weights, classes)
    whole, merged = MeanAveragePrecision(of), MeanAveragePrecision(of)
    for part in parts:
        whole.update(*batch(part))
    for i in (i for i in order if i < len(parts)):
        evaluator = pickle.loads(pickle.dumps(MeanAveragePrecision(of)))
        evaluator.update(*batch(parts[i]))
        merged.merge(pickle.loads(pickle.dumps(evaluator)))
    everything = mean_average_precision([image for part in parts for image in part], of)
    assert merged.compute() == pytest.approx(whole.compute(), nan_ok=True)
    assert merged.compute() == pytest.approx({"map@3": everything}, nan_ok=True)


@given(st.lists(st.tuples(rows, class_ids), min_size=1, max_size=6))
@settings(deadline=None)
def test_accuracy_equals_brute_force(images: list[tuple[list[float], int]]) -> None:
    metric = TopKAccuracy((1, 3, 20))
    metric.update(*batch([(row, (label,)) for row, label in images]))
    expected = {
        f"top{k}": mean([float(label in ranking(row, range(8))[:k]) for row, label in images])
        for k in (1, 3, 20)
    }
    assert metric.compute() == pytest.approx(expected)


@pytest.mark.parametrize("value", [math.nan, -math.nan])
def test_logits_that_are_not_numbers_score_nothing(value: float) -> None:
    good = [1.0] + [0.0] * (NUM_CLASSES - 1)
    diverged = [value] * NUM_CLASSES
    partly = [1.0] + [value] * (NUM_CLASSES - 1)
    images: list[Image] = [(good, (0,)), (diverged, (0,)), (partly, (0,)), (diverged, (7,))]
    precision, accuracy = MeanAveragePrecision(definition(100)), TopKAccuracy((1, 100))
    for metric in (precision, accuracy):
        metric.update(*batch(images))
    assert precision.compute() == {"map@100": 0.25}
    assert accuracy.compute() == {"top1": 0.25, "top100": 0.25}
    outside = definition(100, classes=[0])
    assert mean_average_precision(images[:3], outside) == pytest.approx(1 / 3)


def test_accuracy_needs_one_label() -> None:
    with pytest.raises(InputError, match="one label per image"):
        TopKAccuracy((1,)).update(torch.zeros(1, 3), LabelLists.from_lists([[0, 1]]))


def test_a_metric_is_feasible_at_the_size_of_jft() -> None:
    """14,000 x 17,000 logits go in batches; one batch equals its rows taken one by one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 17_000, generator=generator)
    lists = [list(range(i, 17_000, 470)) for i in range(32)]
    classes = torch.randperm(17_000, generator=generator)[:6_000].sort().values
    weights = torch.rand(17_000, generator=generator)
    of = MapDefinition(100, weights, classes)
    together, apart = MeanAveragePrecision(of), MeanAveragePrecision(of)
    together.update(logits, LabelLists.from_lists(lists))
    for row, labels in zip(logits, lists, strict=True):
        apart.update(row[None], LabelLists.from_lists([labels]))
    assert together.compute() == pytest.approx(apart.compute())
    rows, heavy = logits.tolist(), weights.tolist()
    scores = [
        average_precision(row, labels, 100, heavy, classes.tolist())
        for row, labels in zip(rows, lists, strict=True)
    ]
    assert together.compute()["map@100"] == pytest.approx(mean(scores))
