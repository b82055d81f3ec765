"""Losses against dense references in float64, and what they must bear."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.errors import InputError
from worker.data.labels import LabelLists
from worker.objective import create_objective

NUM_CLASSES = 7
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
class_ids = st.integers(0, NUM_CLASSES - 1)
# A class may be named twice.
label_lists = st.lists(st.lists(class_ids, max_size=NUM_CLASSES), min_size=1, max_size=9)
class_weights = st.none() | st.lists(
    st.floats(0, 8, width=32), min_size=NUM_CLASSES, max_size=NUM_CLASSES
).map(torch.tensor)


def random_logits(num_images: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, NUM_CLASSES, generator=generator) * 4
    return logits.requires_grad_()


def multi_hot(lists: list[list[int]], num_classes: int = NUM_CLASSES) -> Tensor:
    return torch.tensor(
        [[float(i in row) for i in range(num_classes)] for row in lists], dtype=torch.float64
    ).view(-1, num_classes)


def dense_loss(logits: Tensor, hot: Tensor, weights: Tensor | None = None) -> Tensor:
    """With a dense target, in float64."""
    weights = None if weights is None else weights.double()
    total = F.binary_cross_entropy_with_logits(logits.double(), hot, weights, reduction="sum")
    return total / max(1, len(hot))


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None)
@given(label_lists, st.integers(0, 2**31), class_weights)
def test_multilabel_is_the_sum_of_dense_cross_entropies(device, lists, seed, weights) -> None:
    logits = random_logits(len(lists), seed)
    objective = create_objective("multilabel", NUM_CLASSES, label_weights=weights)
    loss = objective.loss(logits.to(device), LabelLists.from_lists(lists))
    expected = dense_loss(logits, multi_hot(lists), weights)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=3e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    (wanted,) = torch.autograd.grad(3 * expected, logits)
    torch.testing.assert_close(gradient, wanted, rtol=3e-6, atol=1e-7)


@settings(deadline=None)
@given(label_lists, st.integers(0, 2**31))
def test_the_gradient_is_sigmoid_minus_target(lists: list[list[int]], seed: int) -> None:
    logits = random_logits(len(lists), seed)
    loss = create_objective("multilabel", NUM_CLASSES).loss(logits, LabelLists.from_lists(lists))
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = (logits.double().sigmoid() - multi_hot(lists)) / len(lists)
    torch.testing.assert_close(gradient.double(), expected, rtol=3e-6, atol=1e-8)


@pytest.mark.parametrize("value", [1e-30, 17.0, 20.5, 90.0, 1e4, 3e38, math.inf])
def test_extreme_logits_on_the_right_side_cost_what_they_should(value: float) -> None:
    """exp(-x) to the last digit where float32 holds it, and no NaN beside another's loss."""
    logits = torch.tensor([[value, -value, 0.0], [0.0, -value, value]], requires_grad=True)
    labels = LabelLists.from_lists([[0], [2]])
    loss = create_objective("multilabel", 3).loss(logits, labels)
    one = math.log1p(math.exp(-value))
    assert loss.item() == pytest.approx(2 * one + math.log(2), rel=1e-6)
    loss.backward()
    outside = 0.5 / (1 + math.exp(min(value, 700)))
    expected = torch.tensor([[-outside, outside, 0.25], [0.25, outside, -outside]])
    torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("value", [17.0, 90.0, 1e4])
def test_extreme_logits_on_the_wrong_side_cost_their_distance(value: float) -> None:
    logits = torch.tensor([[-value, value]], requires_grad=True)
    loss = create_objective("multilabel", 2).loss(logits, LabelLists.from_lists([[0]]))
    assert loss.item() == pytest.approx(2 * value + 2 * math.log1p(math.exp(-value)), rel=1e-6)
    loss.backward()
    expected = 1 / (1 + math.exp(-value))
    torch.testing.assert_close(logits.grad, torch.tensor([[-expected, expected]]))


def test_infinite_losses_are_infinite_and_nan_stays_nan() -> None:
    objective = create_objective("multilabel", 2)
    for row, label in (([math.inf, 0.0], 1), ([-math.inf, 0.0], 0)):
        assert objective.loss(torch.tensor([row]), LabelLists.from_lists([[label]])) == math.inf
    for label in (0, 1):
        logits = torch.tensor([[math.nan, 0.0]], requires_grad=True)
        loss = objective.loss(logits, LabelLists.from_lists([[label]]))
        assert loss.isnan()
        loss.backward()
        assert logits.grad is not None
        assert logits.grad.isnan().tolist() == [[True, False]]


def test_many_unlikely_classes_add_up() -> None:
    """Small terms survive: 17,000 classes of logit -18 aren't free, and one at 30 hides none."""
    logits = torch.full((2, 17_000), -18.0)
    logits[0, 3] = 30
    labels = LabelLists.from_lists([[3], []])
    loss = create_objective("multilabel", 17_000).loss(logits, labels)
    assert loss.item() == pytest.approx((2 * 17_000 - 1) * math.exp(-18) / 2, rel=1e-5)


def layouts() -> list[Tensor]:
    rows = random_logits(4, 1).detach()
    return [rows[:1].expand(4, -1), rows.t().contiguous().t(), rows.repeat(1, 2)[:, ::2]]


@pytest.mark.parametrize("logits", layouts(), ids=["expanded", "transposed", "strided"])
def test_logits_of_any_layout(logits: Tensor) -> None:
    lists = [[0, 2], [], [6], [1, 1]]
    leaf = logits.requires_grad_()
    loss = create_objective("multilabel", NUM_CLASSES).loss(leaf, LabelLists.from_lists(lists))
    expected = dense_loss(leaf, multi_hot(lists))
    torch.testing.assert_close(loss.double(), expected)
    wanted = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_gradient_has_the_type_of_the_logits_and_is_rounded_once(dtype: torch.dtype) -> None:
    weights = torch.linspace(0.1, 2, NUM_CLASSES)
    objective = create_objective("multilabel", NUM_CLASSES, label_weights=weights)
    labels = LabelLists.from_lists([[0, 2], [], [6]])
    low = random_logits(3, 0).detach().to(dtype).requires_grad_()
    full = low.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.loss(low, labels), low)
    (exact,) = torch.autograd.grad(objective.loss(full, labels), full)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, exact.to(dtype), rtol=0, atol=0)


def test_under_autocast_the_loss_is_that_of_the_rounded_logits() -> None:
    torch.manual_seed(0)
    dense, inputs = torch.nn.Linear(5, NUM_CLASSES), torch.randn(3, 5)
    labels = LabelLists.from_lists([[0, 2], [], [6]])
    with torch.autocast("cpu", torch.bfloat16):
        logits = dense(inputs)
        assert logits.dtype == torch.bfloat16
        loss = create_objective("multilabel", NUM_CLASSES).loss(logits, labels)
    assert loss.dtype == torch.float32
    expected = dense_loss(logits, multi_hot([[0, 2], [], [6]]))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    assert dense.weight.grad is not None
    assert dense.weight.grad.isfinite().all()


def test_only_the_logits_are_kept_for_the_backward_pass() -> None:
    logits = random_logits(9, 0)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        labels = LabelLists.from_lists([[1]] * 9)
        create_objective("multilabel", NUM_CLASSES).loss(logits, labels)
    large = [tensor.data_ptr() for tensor in kept if tensor.numel() >= logits.numel()]
    assert large == [logits.data_ptr()]


def test_the_gradient_can_be_taken_again_but_has_no_derivative() -> None:
    logits = random_logits(1, 0)
    loss = create_objective("multilabel", NUM_CLASSES).loss(logits, LabelLists.from_lists([[1]]))
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_a_compiled_step_gives_the_same() -> None:
    torch.manual_seed(0)
    dense, inputs = torch.nn.Linear(5, NUM_CLASSES), torch.randn(3, 5)
    weights = torch.rand(NUM_CLASSES)
    objective = create_objective("multilabel", NUM_CLASSES, label_weights=weights)

    def step(inputs: Tensor, labels: LabelLists) -> Tensor:
        return objective.loss(dense(inputs), labels)

    compiled = torch.compile(step, backend="aot_eager")
    for lists in ([[0, 2], [], [6]], [[1], [2, 2], [3, 4]]):
        labels = LabelLists.from_lists(lists)
        found = torch.autograd.grad(compiled(inputs, labels), dense.weight)
        wanted = torch.autograd.grad(step(inputs, labels), dense.weight)
        torch.testing.assert_close(found, wanted)


def test_without_gradients_there_is_a_loss() -> None:
    labels, objective = LabelLists.from_lists([[1]]), create_objective("multilabel", NUM_CLASSES)
    expected = objective.loss(random_logits(1, 0), labels)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert objective.loss(random_logits(1, 0), labels) == expected


@settings(deadline=None)
@given(
    st.lists(class_ids, min_size=1, max_size=9),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_softmax_is_the_cross_entropy_with_smoothed_targets(
    ids: list[int], seed: int, smoothing: float
) -> None:
    """Szegedy et al. (1512.00567), section 7: (1 - epsilon) H(q, p) + epsilon H(u, p)."""
    logits = random_logits(len(ids), seed)
    objective = create_objective("softmax", NUM_CLASSES, label_smoothing=smoothing)
    loss = objective.loss(logits, LabelLists.from_lists([[i] for i in ids]))
    p = torch.exp(logits.double()) / torch.exp(logits.double()).sum(1, keepdim=True)
    label = torch.stack([-p[row, i].log() for row, i in enumerate(ids)])
    uniform = -(p.log() / NUM_CLASSES).sum(1)
    expected = ((1 - smoothing) * label + smoothing * uniform).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    # The same as a distribution: q'(k) = (1 - epsilon) [k = y] + epsilon / K.
    q = (1 - smoothing) * multi_hot([[i] for i in ids]) + smoothing / NUM_CLASSES
    torch.testing.assert_close(expected, -(q * p.log()).sum(1).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient.double(), (p - q) / len(ids), rtol=1e-4, atol=1e-6)


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
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, NUM_CLASSES)


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
    with pytest.raises(InputError, match="label_weights has no meaning for the softmax"):
        create_objective("softmax", NUM_CLASSES, label_weights=torch.ones(NUM_CLASSES))
    assert create_objective("multilabel", NUM_CLASSES, 0.0).num_classes == NUM_CLASSES
