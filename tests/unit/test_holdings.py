"""What a worker says it still holds of a shard is that shard's version, bit for bit."""

import threading

import pytest
import torch
from local_shards import LocalClient, LocalShard
from torch import nn

from model.flat import FlatModule
from ps.consistency import Async
from ps.rules import SGD, Ema
from ps.schedule import Clocks, Constant, Horizon
from ps.shard import ShardConfig
from worker import pipeline as pipeline_module
from worker.data.labels import LabelLists
from worker.data.loader import Batch
from worker.gradient import GradientComputer
from worker.host_vectors import HostVectors
from worker.local_steps import LocalSteps
from worker.loop import WorkerLoop
from worker.objective import create_objective
from worker.pipeline import PipelineSettings

NUM_CLASSES, NUM_BATCHES = 4, 6
HORIZON = Horizon(epoch_samples=100, num_workers=1)
OBJECTIVE = create_objective("multilabel", NUM_CLASSES)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3)
        self.norm = nn.BatchNorm2d(24)
        self.dense = nn.Linear(24, NUM_CLASSES)

    def forward(self, images):
        return self.dense(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, 3, 6, 6), generator=generator, dtype=torch.uint8)
    return Batch(images, LabelLists.from_lists([[0], [1], [2]]), 0, 3, ())


class Lost(RuntimeError):
    """A shard that is gone."""


class Mortal(LocalShard):
    """Keeps each version that is pulled; dies in its n-th pull or push, before or after a write.

    Dead it stays: a push in flight behind the one that it died in must not make a version.
    """

    def __init__(self, service, dies: tuple[str, int]) -> None:
        super().__init__(service)
        self.versions, self._dies, self._calls = {}, dies, {"pull": 0, "fill": 0, "push": 0}
        self._dead = threading.Event()

    def _count(self, what: str) -> None:
        self._calls[what] += 1
        if (what, self._calls[what]) == self._dies:
            self._dead.set()
        if self._dead.is_set():
            raise Lost

    def pull(self, parameters, statistics, at_least=0, worker=None, filling=None):
        self._count("pull")

        def filling_then_dying() -> None:
            filling()
            parameters[:1].fill_(torch.nan)
            self._count("fill")

        pulled = super().pull(parameters, statistics, at_least, worker, filling_then_dying)
        self.versions[pulled.version] = (parameters.clone(), statistics.clone(), pulled)
        return pulled

    def push(self, push):
        self._count("push")
        return super().push(push)


def train(
    dies: tuple[str, int], settings: PipelineSettings, local: bool
) -> tuple[WorkerLoop, Mortal]:
    torch.manual_seed(3)
    flat = FlatModule(Tiny())
    client = LocalClient(
        flat,
        2,
        lambda ranges: ShardConfig(ranges, SGD(), Constant(lr=0.1), HORIZON, Ema(), Async()),
    )
    client.shards[1] = Mortal(client.shards[1].service, dies)
    computer = GradientComputer(flat, OBJECTIVE, None)
    steps = LocalSteps(computer, SGD(), Constant(lr=0.1), HORIZON, Clocks()) if local else None
    loop = WorkerLoop(0, 0, computer, client, pipeline=settings, local=steps)
    with pytest.raises(Lost):
        loop.run([batch_of(seed) for seed in range(NUM_BATCHES)], lambda step: None)
    return loop, client.shards[1]


IN_TURN, OVERLAP = PipelineSettings(), PipelineSettings(overlap=True)


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize(
    ("settings", "local"), [(IN_TURN, False), (IN_TURN, True), (OVERLAP, False)]
)
@pytest.mark.parametrize("dies", [("push", 3), ("pull", 3), ("fill", 3)])
def test_the_newest_whole_version_is_there_after_its_shard_died(
    dies, settings, local, twins, monkeypatch
):
    def vectors(computer, *, overlap):
        return HostVectors(computer, overlap=overlap, twins=twins or None)

    monkeypatch.setattr(pipeline_module, "HostVectors", vectors)
    loop, shard = train(dies, settings, local)
    copy, version = loop.holdings.copy(1), loop.holdings.version(1)
    if dies[0] == "fill" and settings is IN_TURN and not local and not twins:
        assert (copy, version) == (None, None), "it was written over where it lay"
        return
    assert copy.version == version == max(shard.versions)
    parameters, statistics, pulled = shard.versions[version]
    assert torch.equal(copy.parameters, parameters)
    assert torch.equal(copy.statistics, statistics)
    # One worker pushes alone: the version that its push number n made has the pushes up to n.
    assert copy.newest_pushes == pulled.newest_pushes
    assert copy.newest_pushes == ({0: (0, version - 1)} if version else {})


def test_a_worker_that_has_pulled_nothing_holds_nothing():
    loop, _ = train(("pull", 1), IN_TURN, False)
    assert (loop.holdings.version(1), loop.holdings.copy(1)) == (None, None)
    assert loop.holdings.version(0) == 0
