"""Which version a worker computes for, where many workers' pushes make one (Algorithm 3).

A round is a version's number, and the same at every shard. A worker computes for the lowest that
it pulled, and a shard that is ahead of it takes the push for a late one. Then it waits until all
shards are past that round.

So nobody waits for ever, whoever dies between two shards. Where a shard that is behind all others
lacks a push of a worker, that worker's last round lies before this shard's version: all shards are
past it, and the worker may pull. What it pulls is no lower than that version, so this is its round,
and the shard gets what it lacks.

Rounds of each shard by itself would not do. One life may come to be ahead at one shard, where a
former life has pushed for it, and another life at another shard; then each waits for a version that
the other is to make.
"""

from collections.abc import Sequence

from ps.shard import Outcome, Receipt


class Rounds:
    """The rounds of one life of a worker. The first is the lowest version that it finds."""

    def __init__(self, num_shards: int) -> None:
        self._num_shards, self._round = num_shards, 0
        self.at_least: Sequence[int] = [0] * num_shards
        """The version of each shard that may be pulled next, or a later one."""

    def begin(self, pulled: Sequence[int]) -> Sequence[int]:
        """The versions, by shard, that the push of what is computed from `pulled` must name."""
        self._round = min(pulled)
        return [self._round] * self._num_shards

    def end(self, receipts: Sequence[Receipt]) -> None:
        """The round's push is settled, at all shards.

        A shard that dropped it for its numbers still lacks one: its worker makes another for this
        round.
        """
        done = all(receipt.outcome in _MAKES_NEXT for receipt in receipts)
        self.at_least = [self._round + done] * self._num_shards


_MAKES_NEXT = (Outcome.APPLIED, Outcome.ACCUMULATED, Outcome.STALE)
"""Outcomes after which the next version is there or comes without this worker's doing."""
