"""Stand-ins for `ParameterClient` within this process: shards that record, and real shards."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from waiting import DEADLINE_S

from model.flat import FlatModule
from ps.layout import Layout, ShardRanges, plan_layout
from ps.push import Push
from ps.service import ShardService
from ps.shard import Outcome, Receipt, ShardConfig, initial_state
from ps.snapshot import Pulled


def layout_of(flat: FlatModule, num_shards: int) -> Layout:
    return plan_layout(flat.parameter_segments, flat.statistic_segments, num_shards)


class RecordingShard:
    """Hands out what a model held at first, under its own number as version; keeps pushes."""

    def __init__(self, number: int, parameters: Tensor, statistics: Tensor) -> None:
        self._number, self._held = number, (parameters.clone(), statistics.clone())
        self.lane = "grpc"
        self.calls: list[str] = []
        self.pushes: list[Push] = []

    def pull(self, parameters, statistics, at_least=0, worker=None, filling=None):
        assert at_least == 0, "asynchronous workers wait for nothing"
        self.calls.append("pull")
        parameters.copy_(self._held[0])
        statistics.copy_(self._held[1])
        return Pulled(self._number)

    def push(self, push):
        self.calls.append("push")
        kept = {
            "gradient": push.gradient.clone(),
            "statistics_delta": push.statistics_delta.clone(),
        }
        self.pushes.append(replace(push, **kept))
        return Receipt(Outcome.APPLIED, self._number, 0, 0.1)


class RecordingClient:
    """Recording shards behind one layout."""

    def __init__(self, flat: FlatModule, num_shards: int) -> None:
        self.layout = layout_of(flat, num_shards)
        self.shards = [
            RecordingShard(
                number,
                flat.parameters[ranges.parameters.slice()],
                flat.statistics[ranges.statistics.slice()],
            )
            for number, ranges in enumerate(self.layout.shards)
        ]

    def pushed_gradient(self, index: int) -> Tensor:
        """The whole vector of the push of this index."""
        return torch.cat([shard.pushes[index].gradient for shard in self.shards])


class LocalShard:
    """A real shard, called without a lane. `before_push` and `after_pull` may hold calls up."""

    def __init__(self, service: ShardService) -> None:
        self.service = service
        self.lane = "grpc"
        self.before_push: Callable[[Push], None] = lambda push: None
        self.after_pull: Callable[[int], None] = lambda version: None

    def pull(self, parameters, statistics, at_least=0, worker=None, filling=None):
        assert self.service.reached(at_least, DEADLINE_S, worker), "waited in vain"
        with self.service.pinned(worker) as snapshot:
            if filling is not None:
                filling()
            parameters.copy_(snapshot.parameters)
            statistics.copy_(snapshot.statistics)
            pulled = Pulled(snapshot.version, snapshot.newest_pushes)
        self.after_pull(pulled.version)
        return pulled

    def push(self, push):
        self.before_push(push)
        return self.service.push(replace(push, gradient=push.gradient.clone()))


class LocalClient:
    """Real shards, which start from a model's vectors."""

    def __init__(
        self,
        flat: FlatModule,
        num_shards: int,
        config: Callable[[ShardRanges], ShardConfig],
    ) -> None:
        self.layout = layout_of(flat, num_shards)
        self.shards = [self._shard(flat, ranges, config) for ranges in self.layout.shards]

    def _shard(self, flat, ranges, config):
        service = ShardService(config(ranges), allocate=torch.empty)
        vectors = (
            flat.parameters[ranges.parameters.slice()],
            flat.statistics[ranges.statistics.slice()],
        )
        service.load(initial_state(service.config.rule, *vectors))
        return LocalShard(service)

    def held(self) -> tuple[Tensor, Tensor]:
        """Parameters and statistics of all shards."""
        states = [shard.service.cut("all", 0, 0.0, None) or shard for shard in self.shards]
        vectors: list[Sequence[Tensor]] = []
        for shard in states:
            state = shard.service.captured("all")
            assert state is not None
            vectors.append((state.vectors["parameters"], state.vectors["statistics"]))
        return torch.cat([each[0] for each in vectors]), torch.cat([each[1] for each in vectors])
