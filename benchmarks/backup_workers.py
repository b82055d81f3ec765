"""What backup workers are for: speed with one worker that takes 20 times as long.

Four workers as threads of this process, which sleep in place of computing, so that the machine's
load tells on all alike, push to a real shard through the worker's own loop. Ways take turns. Prints
one line `RESULT {json}` for each: updates/s, and their ratio to three workers without the slow one
(Chen et al. 2016, section 3.2, in kind).
"""

import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import click
import torch
from torch import Tensor, nn

from model.flat import FlatModule
from ps.client import ParameterClient
from ps.consistency import Sync
from ps.layout import plan_layout
from ps.push import Push
from ps.rules import SGD, Ema
from ps.schedule import Constant, Horizon
from ps.service import ShardService
from ps.shard import Receipt, ShardConfig, initial_state
from ps.snapshot import Pulled
from worker.data.labels import LabelLists
from worker.data.loader import Batch
from worker.gradient import GradientComputer
from worker.loop import WorkerLoop
from worker.objective import create_objective
from worker.step_report import GradientSummary

NUM_CLASSES = 2


@dataclass(frozen=True)
class Way:
    """A set of workers and what they do."""

    name: str
    num_workers: int
    backup_workers: int
    slow: bool


WAYS = (
    Way("3 workers, none slow", 3, 0, slow=False),
    Way("4 workers, one slow, b = 1", 4, 1, slow=True),
    Way("4 workers, one slow, b = 0", 4, 0, slow=True),
)


class _Sleeper(GradientComputer):
    """Takes a while for each gradient, and no processor."""

    def __init__(self, flat: FlatModule, seconds: float) -> None:
        super().__init__(flat, create_objective("softmax", NUM_CLASSES), None)
        self._seconds = seconds

    def add(self, batch: Batch) -> None:
        time.sleep(self._seconds)

    def finish(self) -> GradientSummary:
        self.flat.gradients.fill_(1.0)
        return GradientSummary(0.0, 1.0)


class _LocalShard:
    """What `ShardClient` does, without a lane."""

    def __init__(self, service: ShardService) -> None:
        self._service = service
        self.lane = "grpc"

    def pull(
        self,
        parameters: Tensor,
        statistics: Tensor,
        at_least: int,
        worker: int,
        filling: Callable[[], None],
    ) -> Pulled:
        while not self._service.reached(at_least, 1.0):
            pass
        with self._service.pinned() as snapshot:
            filling()
            parameters.copy_(snapshot.parameters)
            return Pulled(snapshot.version)

    def push(self, push: Push) -> Receipt:
        return self._service.push(replace(push, gradient=push.gradient.clone()))


class _LocalClient(ParameterClient):
    def __init__(self, flat: FlatModule, policy: Sync, num_workers: int) -> None:
        self.layout = plan_layout(flat.parameter_segments, flat.statistic_segments, 1)
        horizon = Horizon(epoch_samples=1000, num_workers=num_workers)
        config = ShardConfig(
            self.layout.shards[0], SGD(), Constant(lr=1e-6), horizon, Ema(), policy
        )
        self.service = ShardService(config, allocate=torch.empty)
        self.service.load(initial_state(SGD(), flat.parameters, flat.statistics))
        self.shards = [_LocalShard(self.service)]  # type: ignore[list-item]


def _updates_per_s(way: Way, step_s: float, num_updates: int) -> float:
    """Until the shard has made so many updates; then all stop at their next batch."""
    flats = [FlatModule(nn.Linear(4, NUM_CLASSES)) for _ in range(way.num_workers)]
    client = _LocalClient(flats[0], Sync(backup_workers=way.backup_workers), way.num_workers)
    over = threading.Event()
    batch = Batch(
        torch.zeros(1, 3, 2, 2, dtype=torch.uint8), LabelLists.from_lists([[0]]), 0, 1, ()
    )

    def work(worker: int) -> None:
        factor = 20 if way.slow and worker == way.num_workers - 1 else 1
        computer = _Sleeper(flats[worker], factor * step_s)
        loop = WorkerLoop(worker, 0, computer, client, waits=True)
        loop.run(iter(lambda: None if over.is_set() else batch, None), lambda report: None)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(way.num_workers)]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    client.service.reached(num_updates, 600.0)
    rate = num_updates / (time.perf_counter() - start_s)
    over.set()
    for worker, thread in enumerate(threads):
        thread.join(step_s * 100)
        client.service.expect(range(worker + 1, way.num_workers), worker + 1)
    return rate


def _row(way: Way, rates: Sequence[float], plain: Sequence[float]) -> dict[str, object]:
    ratios = [rate / other for rate, other in zip(rates, plain, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "way": way.name,
        "updates_per_s": round(statistics.median(rates), 2),
        "x_without_slow": round(statistics.median(ratios), 3),
        "quartiles": [round(low, 3), round(high, 3)],
    }


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2))
@click.option("--step-ms", default=20.0, show_default=True, help="Of a worker that isn't slow.")
@click.option("--updates", default=40, show_default=True, help="Of each way in each round.")
def main(rounds: int, step_ms: float, updates: int) -> None:
    rates: dict[Way, list[float]] = defaultdict(list)
    for number in range(rounds):
        for way in (*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)]):
            wanted = updates if way.backup_workers or not way.slow else max(4, updates // 10)
            rates[way].append(_updates_per_s(way, step_ms / 1000, wanted))
    for way in WAYS:
        print("RESULT", json.dumps(_row(way, rates[way], rates[WAYS[0]])), flush=True)


if __name__ == "__main__":
    main()
