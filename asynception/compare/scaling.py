"""How speed grows with the number of workers, among groups that differ in nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

from asynception.compare.groups import differing
from asynception.compare.summary import GroupSummary

_FEWER = {"scaling.num_workers"}


@dataclass(frozen=True)
class Efficiency:
    """A group's speed against that of fewer workers."""

    summary: GroupSummary
    base: GroupSummary

    @property
    def speedup(self) -> float:
        assert self.summary.rate is not None
        assert self.base.rate is not None
        return self.summary.rate.mean / self.base.rate.mean

    @property
    def efficiency(self) -> float:
        """Speed per worker, of the base's; 1 is a speed in proportion to workers."""
        return self.speedup * self.base.group.num_workers / self.summary.group.num_workers


def efficiencies(summaries: Sequence[GroupSummary]) -> list[Efficiency]:
    """Of every group that has a twin with fewer workers, against the twin with the fewest."""
    known = [each for each in summaries if each.rate is not None]
    found = []
    for summary in known:
        twins = [each for each in known if _differ_in_workers_alone(each, summary)]
        base = min(twins, key=lambda each: each.group.num_workers, default=summary)
        if base.group.num_workers < summary.group.num_workers:
            found.append(Efficiency(summary, base))
    return found


def _differ_in_workers_alone(one: GroupSummary, other: GroupSummary) -> bool:
    keys = differing([one.group.settings, other.group.settings])
    return set(keys) == _FEWER
