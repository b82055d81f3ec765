"""Packages of others that bear our names, or write into our folders."""

import importlib.metadata
from collections.abc import Mapping, Sequence

from asynception.doctor.finding import Verdict, fail, ok
from asynception.packages import PACKAGES, check_not_shadowed

_OURS = "asynception"


def measure_strangers() -> Verdict:
    try:
        check_not_shadowed()
    except ImportError as error:
        return judge_strangers(str(error), {})
    owners = importlib.metadata.packages_distributions()
    return judge_strangers(None, {name: owners.get(name, ()) for name in PACKAGES})


def judge_strangers(shadowed: str | None, owners: Mapping[str, Sequence[str]]) -> Verdict:
    """shadowed: what the check at import said. owners: distributions that install each name.

    Of two that install the same name into one folder, the second has overwritten the first.
    """
    if shadowed is not None:
        return fail(shadowed, "remove or rename the other package, or change PYTHONPATH")
    others = {
        name: sorted({each for each in owned if each.lower() != _OURS})
        for name, owned in owners.items()
    }
    told = [f"{name} ({', '.join(owned)})" for name, owned in others.items() if owned]
    if told:
        return fail(
            f"other distributions install packages of our names: {', '.join(told)}",
            "remove those, then pip install --force-reinstall asynception",
        )
    return ok(f"{', '.join(owners)} are our own")
