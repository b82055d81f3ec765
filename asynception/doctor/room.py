"""Whether a cluster has the resources that a recipe reserves."""

from collections.abc import Mapping

from asynception.doctor.finding import Verdict, fail, ok, warn

Resources = Mapping[str, float]


def judge_room(num_nodes: int, total: Resources, free: Resources, wanted: Resources) -> Verdict:
    """total, free: of the whole cluster. Whether they fit node by node, Ray alone knows."""
    shown = ", ".join(
        _amount(name, total.get(name, 0.0)) for name in ("CPU", "GPU", "memory") if name in total
    )
    found = f"{num_nodes} node{'s' if num_nodes > 1 else ''} with {shown}"
    never = _lacking(total, wanted)
    if never:
        return fail(f"{found}; the recipe reserves more: {never}", _mend(total, wanted))
    now = _lacking(free, wanted)
    if now:
        return warn(
            f"{found}; the recipe reserves more than is free now: {now}",
            f"wait for what runs there to end, or {_mend(free, wanted)}",
        )
    return ok(found)


def _lacking(there: Resources, wanted: Resources) -> str:
    return ", ".join(
        f"{_amount(name, amount)} (there is {_amount(name, there.get(name, 0.0))})"
        for name, amount in wanted.items()
        if amount > there.get(name, 0.0)
    )


def _mend(there: Resources, wanted: Resources) -> str:
    names = {name for name, amount in wanted.items() if amount > there.get(name, 0.0)}
    if names == {"memory"}:
        return "lower scaling.num_servers or scaling.num_workers, or add nodes"
    return "lower scaling.num_workers or scaling.resources_per_worker, or add nodes"


def _amount(name: str, value: float) -> str:
    return f"{value / 1e9:.1f} GB of memory" if name == "memory" else f"{value:g} {name}"
