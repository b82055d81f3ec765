import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.errors import InputError
from worker.data.labels import LabelLists
from worker.objective import create_objective

NUM_CLASSES = 7
label_sets = st.lists(st.sets(st.integers(0, NUM_CLASSES - 1)).map(sorted), min_size=1, max_size=9)


def random_logits(num_images: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, NUM_CLASSES, generator=generator) * 4
    return logits.requires_grad_()


@given(label_sets, st.integers(0, 2**31))
def test_multilabel_is_the_sum_of_dense_cross_entropies(lists: list[list[int]], seed: int) -> None:
    logits = random_logits(len(lists), seed)
    loss = create_objective("multilabel", NUM_CLASSES).loss(logits, LabelLists.from_lists(lists))
    dense = torch.tensor([[float(i in row) for i in range(NUM_CLASSES)] for row in lists])
    p = logits.double().sigmoid()
    expected = -(dense * p.log() + (1 - dense) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, (logits.sigmoid() - dense) / len(lists))


@given(
    st.lists(st.integers(0, NUM_CLASSES - 1), min_size=1, max_size=9),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_softmax_is_the_cross_entropy_with_dense_targets(
    ids: list[int], seed: int, smoothing: float
) -> None:
    logits = random_logits(len(ids), seed)
    objective = create_objective("softmax", NUM_CLASSES, label_smoothing=smoothing)
    loss = objective.loss(logits, LabelLists.from_lists([[i] for i in ids]))
    dense = (1 - smoothing) * torch.eye(NUM_CLASSES)[ids] + smoothing / NUM_CLASSES
    torch.testing.assert_close(loss, -(dense * F.log_softmax(logits, 1)).sum(1).mean())


@pytest.mark.parametrize("name", ["multilabel", "softmax"])
def test_low_precision_logits_are_summed_in_float32(name: str) -> None:
    logits = random_logits(5, 0).bfloat16()
    labels = LabelLists.from_lists([[1]] * 5)
    objective = create_objective(name, NUM_CLASSES)
    loss = objective.loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, objective.loss(logits.float(), labels))


@pytest.mark.parametrize("name", ["multilabel", "softmax"])
def test_no_images_have_no_loss(name: str) -> None:
    logits = torch.zeros(0, NUM_CLASSES, requires_grad=True)
    loss = create_objective(name, NUM_CLASSES).loss(logits, LabelLists.from_lists([]))
    assert loss.item() == 0
    loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("count", [0, 2])
def test_softmax_needs_one_label(count: int) -> None:
    objective = create_objective("softmax", NUM_CLASSES)
    labels = LabelLists.from_lists([[1], list(range(count)), [1]])
    with pytest.raises(InputError, match=f"objective=softmax .* an image has {count}"):
        objective.loss(torch.zeros(3, NUM_CLASSES), labels)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_that_drowns_the_label_is_refused(smoothing: float) -> None:
    with pytest.raises(InputError, match=r"label_smoothing=.*leaves no weight"):
        create_objective("softmax", NUM_CLASSES, smoothing)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="objective='hinge' is not known"):
        create_objective("hinge", NUM_CLASSES)
    with pytest.raises(InputError, match=r"label_smoothing=0.1 has no meaning"):
        create_objective("multilabel", NUM_CLASSES, 0.1)
    assert create_objective("multilabel", NUM_CLASSES, 0.0).num_classes == NUM_CLASSES
