"""A worker's own copy of the whole training state, which the other workers have as well."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from model.flat import FlatModule
from ps.client import ModelState
from ps.layout import plan_layout
from ps.rules import Ema, Rule, apply_rule, plan_blocks
from ps.schedule import Clocks, Horizon, Schedule


class Replica:
    """Parameters, BN statistics, optimizer slots and clocks of one rank of a group.

    Ranks that start alike and are given the same gradients stay alike, bit by bit, on processors
    of one kind: rule, schedule and clocks are those of a shard (`ps.shard`), without a server.
    """

    def __init__(
        self,
        flat: FlatModule,
        rule: Rule,
        schedule: Schedule,
        horizon: Horizon,
        ema: Ema | None,
    ) -> None:
        """`ema`: for the one rank that keeps the averages (Algorithm 2); None for the others."""
        self.flat = flat
        self.clocks = Clocks()
        self._rule, self._schedule, self._horizon, self._ema_rule = rule, schedule, horizon, ema
        (whole,) = plan_layout(flat.parameter_segments, flat.statistic_segments, 1).shards
        self._blocks = plan_blocks(whole.parameters.numel, whole.decayed)
        self._after = torch.empty_like(flat.parameters)
        self._statistics = flat.statistics.clone()
        self._slots = {n: torch.full_like(flat.parameters, v) for n, v in rule.slots.items()}
        self._ema = flat.parameters.clone() if ema else None
        self._ema_statistics = flat.statistics.clone()

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self._schedule.rate(self.clocks, self._horizon)

    def load(self, state: ModelState) -> None:
        """Go on from a state; its vectors are copied."""
        for name, vector in self._vectors().items():
            vector.copy_(state.vectors[name])
        self.flat.statistics.copy_(self._statistics)
        self.clocks = state.clocks

    def share(self, group: dist.ProcessGroup) -> None:
        """Give every rank the copy that rank 0 has; all ranks call this together."""
        clocks = torch.tensor([self.clocks.updates, self.clocks.samples])
        common = (self.flat.parameters, self._statistics, *self._slots.values())
        for tensor in (clocks, *common):
            dist.broadcast(tensor, 0, group)
        updates, samples = clocks.tolist()
        self.clocks = Clocks(updates, samples)
        self.flat.statistics.copy_(self._statistics)

    def apply(self, statistics_delta: Tensor, num_samples: int) -> None:
        """One update with `flat.gradients`, the mean over so many samples of all ranks."""
        decay = self._ema_rule.rate(self.clocks.updates) if self._ema_rule else 0.0
        apply_rule(
            self._rule,
            self._blocks,
            self.flat.parameters,
            self._after,
            self.flat.gradients,
            list(self._slots.values()),
            self._ema,
            self.lr,
            decay,
            self.clocks.updates,
        )
        self.flat.parameters.copy_(self._after)
        self._statistics.add_(statistics_delta)
        if self._ema_rule:
            self._ema_statistics.lerp_(self._statistics, 1 - decay)
        self.clocks = Clocks(self.clocks.updates + 1, self.clocks.samples + num_samples)

    def restore_statistics(self) -> None:
        """Take back what this rank's own forward passes did to the module's BN statistics."""
        self.flat.statistics.copy_(self._statistics)

    def state(self, last_sequences: Mapping[int, Mapping[int, int]]) -> ModelState:
        """A copy of all that the run needs to go on, in host memory; of the rank with the EMA."""
        assert self._ema_rule is not None, "this rank keeps no EMA"
        vectors = {name: v.to("cpu", copy=True) for name, v in self._vectors().items()}
        return ModelState(self.clocks, vectors, last_sequences)

    def _vectors(self) -> dict[str, Tensor]:
        """By name, in the order in which a state's vectors travel."""
        averages = {} if self._ema is None else {"ema": self._ema}
        averages |= {"ema_statistics": self._ema_statistics}
        return {
            "parameters": self.flat.parameters,
            "statistics": self._statistics,
            **averages,
            **{f"slot.{name}": slot for name, slot in self._slots.items()},
        }
