"""An evaluation reports the training objective, and MAP@k as it was defined."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from model.flat import FlatModule
from ps.client import ModelState
from ps.schedule import Clocks
from worker.data.labels import LabelLists
from worker.data.lease import Lease
from worker.data.loader import Batch
from worker.data.transform import normalize
from worker.evaluator import Evaluator
from worker.metrics import create_metrics
from worker.objective import create_objective
from worker.ranking import MapDefinition

NUM_CLASSES = 6


class FixedBatches:
    """Stands in for a loader: two batches of images, and one in which all were corrupt."""

    def __init__(self, images: Tensor, lists: Sequence[Sequence[int]]) -> None:
        self.images, self.lists = images, lists

    def batches(self, leases: Sequence[Lease]) -> Iterator[Batch]:
        assert [(lease.start, lease.stop) for lease in leases] == [(0, len(self.images))]
        for part in (slice(0, 3), slice(3, 3), slice(3, None)):
            images, lists = self.images[part], self.lists[part]
            yield Batch(images, LabelLists.from_lists(lists), 0, len(lists), ())


def logits_of(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return module(normalize(images))


@pytest.mark.parametrize("ema", [True, False])
def test_weights_and_subset_reach_what_is_reported(ema: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, NUM_CLASSES))
    flat = FlatModule(module)
    vectors = {
        "parameters": torch.randn_like(flat.parameters),
        "statistics": flat.statistics.clone(),
        "ema": torch.randn_like(flat.parameters),
        "ema_statistics": flat.statistics.clone(),
    }
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    lists = [[0, 1], [2], [], [3, 4, 5], [1]]
    definition = MapDefinition(2, torch.arange(NUM_CLASSES).float(), torch.tensor([1, 2, 4, 5]))
    objective = create_objective("multilabel", NUM_CLASSES, label_weights=torch.rand(NUM_CLASSES))
    evaluator = Evaluator(flat, objective, FixedBatches(images, lists), 5, definition)
    found = evaluator.evaluate(ModelState(Clocks(), vectors, {}), ema=ema)

    torch.testing.assert_close(flat.parameters, vectors["ema" if ema else "parameters"])
    logits, labels = logits_of(module, images), LabelLists.from_lists(lists)
    expected = create_metrics("multilabel", definition)
    expected.update(logits, labels, objective.loss(logits, labels))
    assert found == pytest.approx(expected.compute(), rel=1e-5)
    plain = create_metrics("multilabel", MapDefinition(2))
    plain.update(logits, labels, create_objective("multilabel", NUM_CLASSES).loss(logits, labels))
    assert all(found[name] != pytest.approx(value) for name, value in plain.compute().items())
