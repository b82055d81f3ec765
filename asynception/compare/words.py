"""A comparison in plain words, which claim no more than the runs show."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from asynception.compare import figures
from asynception.compare.groups import SLOW_WORKERS, differing
from asynception.compare.spread import Spread, chance_of_apart, compare
from asynception.compare.summary import GroupSummary

_MODE = "consistency."
_SAME = 0.02
"""Sample counts that differ by less are called equal."""


@dataclass(frozen=True)
class _Measure:
    """Something that groups are compared by."""

    name: str
    of: Callable[[GroupSummary], Spread | None]
    shown: Callable[[float], str]


def describe(summaries: Sequence[GroupSummary], metric: str) -> list[str]:
    """What the runs came to, sentence by sentence. The first group is what others are held to."""
    told = [each for each in summaries if each.group.finished]
    sentences = list(_failures(summaries))
    if not told:
        return [*sentences, "No run finished, so there is nothing to compare."]
    sentences += _measured(told, _Measure(metric, lambda s: s.final, figures.measure))
    sentences += _unequal_samples(told)
    sentences += _target(told, metric)
    sentences += _measured(told, _Measure("samples/s", lambda s: s.rate, figures.number))
    sentences += _staleness(told)
    sentences += _lost(told)
    return sentences


def _failures(summaries: Sequence[GroupSummary]) -> Iterator[str]:
    for each in summaries:
        num_runs, missing = len(each.group.runs), len(each.group.runs) - len(each.group.finished)
        if missing:
            yield (
                f"{missing} of {num_runs} {_runs(num_runs)} of {each.label} did not finish; what "
                "follows leaves them out, which may flatter it."
            )


def _measured(summaries: Sequence[GroupSummary], measure: _Measure) -> Iterator[str]:
    """A sentence of all values, then what may be said of each group against the first."""
    known = [(each, value) for each in summaries if (value := measure.of(each)) is not None]
    if not known:
        return
    parts = [
        f"{each.label} {figures.spread(value, measure.shown)}, {value.num_runs} "
        f"{_runs(value.num_runs)}"
        for each, value in known
    ]
    yield f"{measure.name}, mean and range over runs: {'; '.join(parts)}."
    (first, base), *others = known
    alone = [each.label for each, value in others if compare(value, base) == "alone"]
    if alone:
        yield (
            f"A single run has no spread, so that {measure.name} of {_listed(alone)} may differ "
            f"from that of {first.label} by chance."
        )
    for each, value in others:
        if each.label not in alone:
            yield _held_against(each.label, value, first.label, base, measure)


def _held_against(label: str, value: Spread, first: str, base: Spread, measure: _Measure) -> str:
    """Of two groups of several runs each."""
    difference = value.mean - base.mean
    gap = measure.shown(abs(difference))
    by = f"{gap} {'higher' if difference > 0 else 'lower'} than that of {first} in the mean"
    if gap == measure.shown(0.0):
        by = f"the same as that of {first} in the mean, to the digits shown"
    start = f"{measure.name} of {label} is {by}"
    odds = figures.percent(chance_of_apart(value, base))
    match compare(value, base):
        case "within" | "alone":
            return (
                f"{start}. The runs of one reach into those of the other: no difference is shown."
            )
        case "few":
            return (
                f"{start}, and in each of these runs; with so few runs, that comes about in {odds} "
                "of cases by chance alone, so it is a hint at most."
            )
        case "apart":
            return (
                f"{start}, and in each of these runs; chance alone parts {value.num_runs} and "
                f"{base.num_runs} runs like that in {odds} of cases."
            )


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _unequal_samples(summaries: Sequence[GroupSummary]) -> Iterator[str]:
    known = [(each, each.samples) for each in summaries if each.samples is not None]
    most = max(value.high for _, value in known)
    if min(value.low for _, value in known) >= (1 - _SAME) * most:
        return
    parts = [f"{each.label} {figures.spread(value)}" for each, value in known]
    yield (
        f"The runs did not train on equally many samples: {'; '.join(parts)}. The curves against "
        "samples show them at equal counts."
    )


def _target(summaries: Sequence[GroupSummary], metric: str) -> Iterator[str]:
    known = [(each, each.target) for each in summaries if each.target is not None]
    if not known:
        return
    level = known[0][1].level
    for each, target in known:
        num_runs = len(target.reaches)
        if target.num_reached < num_runs:
            yield (
                f"{target.num_reached} of {num_runs} {_runs(num_runs)} of {each.label} reached "
                f"{metric} {level:g}, so its time to that level is not compared."
            )
    early = [each.label for each, t in known if any(r.at_most for r in t.reaches if r is not None)]
    if early:
        yield (
            f"Runs of {_listed(early)} were at {metric} {level:g} by their first evaluation "
            "already, so they may have reached it sooner than is shown."
        )
    complete = [each for each, target in known if target.spread is not None]
    name = f"Time to {metric} {level:g}"
    yield from _measured(complete, _Measure(name, _time_to_target, figures.seconds))


def _time_to_target(summary: GroupSummary) -> Spread | None:
    return summary.target.spread if summary.target else None


def _staleness(summaries: Sequence[GroupSummary]) -> Iterator[str]:
    known = [(each, each.staleness) for each in summaries if each.staleness is not None]
    if any(value.high > 0 for _, value in known):
        parts = [f"{each.label} {figures.spread(value)}" for each, value in known]
        yield f"Mean staleness in versions: {'; '.join(parts)}."


def _lost(summaries: Sequence[GroupSummary]) -> Iterator[str]:
    for each in summaries:
        if each.lost_share is not None and each.lost_share.high > 0:
            shown = figures.spread(each.lost_share, figures.percent)
            yield f"{each.label} lost {shown} of its gradients, which came too late or not finite."


def reservations(summaries: Sequence[GroupSummary]) -> list[str]:
    """What must be known to read the figures rightly."""
    return [
        *_other_differences(summaries),
        *_uneven_seeds(summaries),
        *_restarts(summaries),
        *_slowed(summaries),
        *_busy(summaries),
        "All modes ran with one learning rate and schedule unless the table of settings shows "
        "otherwise; what suits one mode need not suit another.",
        "Every comparison holds a group against the first one. The more of them are read, the "
        "likelier one of them is apart by chance.",
        "The figures hold for this data, model, machine and number of workers.",
    ]


def _other_differences(summaries: Sequence[GroupSummary]) -> Iterator[str]:
    keys = differing([each.group.settings for each in summaries])
    others = [key for key in keys if not key.startswith(_MODE)]
    if others:
        yield (
            f"The groups differ in more than their mode ({', '.join(others)}), so that a "
            "difference between them need not be the mode's."
        )


def _uneven_seeds(summaries: Sequence[GroupSummary]) -> Iterator[str]:
    seeds = [[run.seed for run in each.group.finished] for each in summaries]
    if any(each != seeds[0] for each in seeds):
        yield "The groups' finished runs haven't the same seeds."


def _restarts(summaries: Sequence[GroupSummary]) -> Iterator[str]:
    for each in summaries:
        runs = each.group.finished
        restarts = sum(run.result.get("restarts", 0) for run in runs)
        deaths = sum(run.result.get("worker_failures", 0) for run in runs)
        if restarts or deaths:
            yield (
                f"In the runs of {each.label}, {deaths} workers died and {restarts} times a run "
                "began again from a checkpoint, which took time."
            )


def _slowed(summaries: Sequence[GroupSummary]) -> Iterator[str]:
    slowed: dict[str, list[str]] = {}
    for each in summaries:
        slow = [key for key in each.group.settings if key.startswith(SLOW_WORKERS)]
        if slow:
            parts = [f"{k.removeprefix(SLOW_WORKERS)}x{each.group.settings[k]:g}" for k in slow]
            slowed.setdefault(", ".join(parts), []).append(each.label)
    for which, labels in slowed.items():
        yield (
            f"In the runs of {_listed(labels)}, workers were made slow on purpose ({which}: worker "
            "x factor). They slept, and so left their cores to the others."
        )


def _busy(summaries: Sequence[GroupSummary]) -> Iterator[str]:
    """Other programs' work beside the runs."""
    attempts = [run.attempt for s in summaries for run in s.group.runs if run.attempt is not None]
    busy = [each.load_before for each in attempts if each.load_before >= each.machine["cores"]]
    if busy:
        yield (
            f"Before {len(busy)} of {len(attempts)} runs the machine had more to do than it has "
            f"cores (load up to {max(busy):g}): other programs then bear on times and speeds as "
            "well as the modes."
        )


def _runs(count: int) -> str:
    return "run" if count == 1 else "runs"
