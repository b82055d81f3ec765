"""Tells when backpropagation has finished a shard's part of the gradient."""

from collections.abc import Callable, Sequence

from torch import Tensor

from model.errors import InputError
from model.flat import FlatModule, Segment
from ps.layout import Layout


class ShardsReady:
    """Calls back once for each shard whose parameters' gradients are all complete.

    Backpropagation ends with the first layers, so the last shards are ready first. A parameter
    that a backward pass doesn't reach leaves its shards unready.
    """

    def __init__(self, flat: FlatModule, layout: Layout) -> None:
        parameters = dict(flat.module.named_parameters())
        self._totals = [0] * len(layout.shards)
        self._missing: list[int] = []
        self._complete: set[str] = set()
        self._ready: Callable[[int], None] | None = None
        for segment in flat.parameter_segments:
            shards = _shards_of(segment, layout)
            for shard in shards:
                self._totals[shard] += 1
            hook = self._hook(segment.name, shards)
            parameters[segment.name].register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def arm(self, ready: Callable[[int], None]) -> None:
        """Before a forward pass: whom to call, in the thread that runs the backward pass."""
        self._missing, self._ready = list(self._totals), ready
        self._complete.clear()

    def disarm(self) -> None:
        """After the backward pass: call nobody."""
        self._ready = None

    def _hook(self, name: str, shards: Sequence[int]) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            if self._ready is None:
                return
            if name in self._complete:
                raise InputError(
                    f"pipeline.early_push = true, but backpropagation adds to the gradient of"
                    f" {name} twice, so a part of it would be pushed: set it to false, or don't"
                    " use a layer in two reentrant checkpoints"
                )
            self._complete.add(name)
            for shard in shards:
                self._missing[shard] -= 1
                if self._missing[shard] == 0:
                    self._ready(shard)

        return note


def _shards_of(segment: Segment, layout: Layout) -> list[int]:
    """Which shards hold a part of a tensor; large ones are cut."""
    return [
        shard
        for shard, ranges in enumerate(layout.shards)
        if ranges.parameters.start < segment.stop and segment.offset < ranges.parameters.stop
    ]
