"""What a cluster lacks for a run, in words."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Resources = Mapping[str, float]

MEMORY, EVALUATOR = "memory", "evaluator"


@dataclass(frozen=True)
class Part:
    """What must be on one node whole: a server, the evaluator, or a worker."""

    kind: str
    resources: Resources
    """Amounts above 0 by Ray's names; memory in bytes."""
    num_processes: int = 1


@dataclass(frozen=True)
class There:
    """What a cluster has."""

    nodes: Sequence[Resources]
    """All that each node has, whoever holds it now."""
    free: Resources
    """What nobody holds, of all nodes together."""


def shortage(parts: Sequence[Part], there: There) -> str | None:
    """What is missing, and what to do about it.

    None if neither the sums nor the sizes of nodes say so: Ray alone knows which parts lie where.
    """
    for name in dict.fromkeys(name for part in parts for name in part.resources):
        needed = sum(part.resources.get(name, 0.0) for part in parts)
        if needed > there.free.get(name, 0.0):
            return (
                f"the run needs {amount(name, needed)} ({_takers(name, parts)}), the cluster has "
                f"{_free(name, there)}: lower {_settings(name, parts)}, or add nodes"
            )
    for part in parts:
        if not any(fits(part.resources, node) for node in there.nodes):
            return (
                f"one {part.kind} needs {named(part.resources)} on one node, and none has that: "
                f"{_smaller(part)}add larger nodes"
            )
    return None


def named(resources: Resources) -> str:
    """Resources in words; memory from 0.1 MB on."""
    told = {k: v for k, v in resources.items() if k != MEMORY or v >= 1e5}
    return ", ".join(amount(name, value) for name, value in told.items())


def amount(name: str, value: float) -> str:
    """Of one resource, in words."""
    return f"{_figure(name, value)} {'of memory' if name == MEMORY else name}"


def _figure(name: str, value: float) -> str:
    if name != MEMORY:
        return f"{value:g}"
    return f"{value / 1e9:.1f} GB" if value >= 5e7 else f"{value / 1e6:.1f} MB"


def fits(wanted: Resources, offered: Resources) -> bool:
    """Whether a node that has so much is large enough."""
    return all(value <= offered.get(name, 0.0) for name, value in wanted.items())


def _free(name: str, there: There) -> str:
    free, total = there.free.get(name, 0.0), sum(node.get(name, 0.0) for node in there.nodes)
    return f"{_figure(name, free)} free" + (f" of {_figure(name, total)}" if total > free else "")


def _takers(name: str, parts: Sequence[Part]) -> str:
    """Like "8 workers with 1 each, 1 evaluator with 2"."""
    told = []
    for kind in _kinds(name, parts):
        takes = [part.resources.get(name, 0.0) for part in parts if part.kind == kind]
        most = "up to " if min(takes) < max(takes) else ""
        several = len(takes) > 1
        told.append(
            f"{len(takes)} {kind}{'s' if several else ''} with {most}{_figure(name, max(takes))}"
            f"{' each' if several else ''}"
        )
    return ", ".join(told)


def _smaller(part: Part) -> str:
    settings = " or ".join(_own_settings(part, part.resources))
    return f"lower {settings}, or " if settings else ""


def _settings(name: str, parts: Sequence[Part]) -> str:
    """Those by which the run would take less of a resource."""
    takers = {part.kind: part for part in parts if part.resources.get(name)}
    numbers = [f"scaling.num_{kind}s" for kind in takers if kind != EVALUATOR]
    shares = [each for part in takers.values() for each in _own_settings(part, [name])]
    return " or ".join([*numbers, *shares])


def _own_settings(part: Part, names: Iterable[str]) -> Iterator[str]:
    """Those that make one part smaller in any of these resources."""
    if part.num_processes > 1:
        yield f"scaling.processes_per_{part.kind}"
    for name in names:
        if name != MEMORY:
            is_evaluator = part.kind == EVALUATOR
            yield "evaluation.cpus" if is_evaluator else f"scaling.resources_per_{part.kind}.{name}"


def _kinds(name: str, parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(part.kind for part in parts if part.resources.get(name)))
