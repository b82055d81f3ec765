"""Where a server is put that has no place in the run's placement group."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


class NoRoom(Exception):
    """A node is gone, or will be, and no other has room for what was on it."""


@dataclass(frozen=True)
class Spot:
    """Where a standby is to be."""

    options: dict[str, Any]
    """Of its actor."""
    is_apart: bool
    """Whether it outlives the node of its server."""
    node: str
    """Ray's id."""


def emptiest(
    nodes: Collection[str], away_from: str, crowded: Mapping[str, int], leaving: Collection[str]
) -> str | None:
    """Of these nodes, which are large enough, the one for a standby of a server on `away_from`.

    crowded: how many servers and standbys each has. leaving: nodes that will soon be gone. If there
    is no other, that of its server is as good, unless it is one of those: then None.
    """
    others = [node for node in nodes if node not in leaving and node != away_from]
    if others:
        return min(others, key=lambda node: (crowded.get(node, 0), node))
    return None if away_from in leaving else away_from
