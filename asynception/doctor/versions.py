"""Python and the packages: new enough, and the same on every node."""

import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from asynception.doctor.finding import Verdict, fail, ok, warn

OLDEST_PYTHON = (3, 11)

SHOWN = ("torch", "ray", "numba", "grpcio", "numpy")
"""Packages that are told in any case."""


def installed_versions() -> dict[str, str]:
    """The version of every package, by its canonical name; the first that Python finds."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for each in importlib.metadata.distributions():
        versions.setdefault(canonicalize_name(each.metadata["Name"]), each.version)
    return versions


def requirements() -> list[str]:
    """What asynception's own metadata asks for; empty where it is not installed."""
    try:
        return importlib.metadata.requires("asynception") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def measure_versions() -> Verdict:
    return judge_versions(sys.version_info[:2], requirements(), installed_versions())


def judge_versions(
    python: tuple[int, int], required: Sequence[str], installed: Mapping[str, str]
) -> Verdict:
    """Whether all that is required is there; extras are nobody's need."""
    found = _in_words(installed)
    if python < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return fail(found, f"install Python {oldest} or newer")
    needs = [Requirement(text) for text in required]
    needs = [each for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})]
    versions = {each: installed.get(canonicalize_name(each.name)) for each in needs}
    unmet = [each for each in needs if not _meets(versions[each], each)]
    if unmet:
        lacking = ", ".join(f"{each} (is {versions[each] or 'missing'})" for each in unmet)
        names = " ".join(f"'{each.name}{each.specifier}'" for each in unmet)
        return fail(f"{found}; unmet: {lacking}", f"pip install {names}")
    if not needs:
        return warn(
            f"{found}; asynception itself is not installed, so nothing says what it needs",
            "pip install asynception's folder or wheel, on every node",
        )
    return ok(found)


def _meets(version: str | None, need: Requirement) -> bool:
    return version is not None and need.specifier.contains(version, prereleases=True)


def _in_words(installed: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {installed.get(name, 'missing')}" for name in ("python", *SHOWN))


def judge_alike(by_node: Mapping[str, Mapping[str, str]]) -> Verdict:
    """Whether all nodes have one version of everything that a run's processes exchange.

    by_node: `installed_versions` of here and of each node, by its address.
    """
    different = []
    for name in ("python", *SHOWN, "protobuf", "asynception"):
        versions = {where: versions.get(name, "missing") for where, versions in by_node.items()}
        if len(set(versions.values())) > 1:
            told = ", ".join(f"{version} at {where}" for where, version in versions.items())
            different.append(f"{name} {told}")
    if different:
        return fail(
            "; ".join(different), "install the same versions on every node, from one lock file"
        )
    return ok(f"the same versions on all nodes as here ({len(by_node) - 1})")
