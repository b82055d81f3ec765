"""Runs that differ in their seeds alone are one group; groups are what is compared."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asynception.config import TrainConfig

if TYPE_CHECKING:
    from asynception.compare.reading import RunRecord

SEED = "training.seed"
SLOW_WORKERS = "scaling.slow_workers."
"""What the setting of each slow worker begins with."""
_MAX_LABEL = 48


@dataclass(frozen=True)
class Group:
    """Runs of the same settings, by rising seed."""

    label: str
    settings: Mapping[str, Any]
    """Flat, by section.key, without the seed and without names and places of runs."""
    runs: Sequence["RunRecord"]

    @property
    def mode(self) -> str:
        return str(self.settings["consistency.mode"])

    @property
    def num_workers(self) -> int:
        counts = self.settings["scaling.num_workers"]
        return int(max(counts)) if isinstance(counts, list | tuple) else int(counts)

    @property
    def finished(self) -> list["RunRecord"]:
        """The runs that reached their end."""
        return [run for run in self.runs if run.finished]


def flat_settings(config: TrainConfig) -> dict[str, Any]:
    """All settings that can bear on what a run comes to, by section.key.

    Functions of the user's own count by their files' text, wherever these lie.
    """
    tree = config.model_dump(mode="json", exclude={"run"})
    if config.model.factory is not None:
        source = config.model.factory_source or ""
        tree["model"]["factory"] = _by_text(config.model.factory, source)
    for name, function in config.data.functions.items():
        tree["data"][name] = _by_text(tree["data"][name], function.source)
    return dict(_flat(tree, ""))


def _by_text(function: str, source: str) -> str:
    """A name for FILE:FUNCTION that its text decides."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return f"{digest}:{function.rpartition(':')[2]}"


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which not all agree, those that some haven't got included."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


def group_runs(runs: Sequence["RunRecord"]) -> list[Group]:
    """The groups, in the order of their first runs."""
    found: list[tuple[dict[str, Any], list[RunRecord]]] = []
    for run in runs:
        settings = flat_settings(run.config)
        del settings[SEED]
        members = next((m for each, m in found if each == settings), None)
        if members is None:
            found.append((settings, [run]))
        else:
            members.append(run)
    labels = _labels(found)
    return [
        Group(label, settings, sorted(members, key=lambda run: run.seed))
        for label, (settings, members) in zip(labels, found, strict=True)
    ]


_WITH_SLOW = ("data.lease_batches", "data.prefetch_batches")
"""What slow workers bring with them, and labels need not repeat."""


def _labels(found: Sequence[tuple[Mapping[str, Any], Sequence["RunRecord"]]]) -> list[str]:
    """The mode; where several groups have it, also what they differ in, or else a folder's name."""
    same_mode: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for settings, _ in found:
        same_mode[settings["consistency.mode"]].append(settings)
    labels: list[str] = []
    for settings, members in found:
        mode = settings["consistency.mode"]
        label = ", ".join([mode, *_told_apart(settings, differing(same_mode[mode]))])
        label = label if len(label) <= _MAX_LABEL else _place(mode, members[0])
        labels.append(label if label not in labels else f"{label} ({len(labels) + 1})")
    return labels


def _told_apart(settings: Mapping[str, Any], keys: Sequence[str]) -> Iterator[str]:
    any_slow = any(key.startswith(SLOW_WORKERS) for key in keys)
    for key in keys:
        value = settings.get(key)
        if key.startswith(SLOW_WORKERS):
            if value is not None:
                yield f"slow {key.removeprefix(SLOW_WORKERS)}x{value:g}"
        elif not (any_slow and key in _WITH_SLOW):
            yield f"{key.rpartition('.')[2]} {shown_value(value)}"


def _place(mode: str, run: "RunRecord") -> str:
    """The mode and the comparison that a run is of, or a lone run's name."""
    return run.name if run.attempt is None else f"{mode} of {run.path.parent.parent.name}"


def shown_value(value: Any) -> str:
    """A setting's value as recipes spell it, floats in short."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
