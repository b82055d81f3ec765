"""Imports run one way: protos, model <- ps <- worker <- asynception."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ALLOWED = {
    "protos": {"protos"},
    "model": {"model"},
    "ps": {"protos", "model", "ps"},
    "worker": {"model", "ps", "worker"},
    "asynception": {"model", "ps", "worker", "asynception"},
}

TRANSPORT_FREE = (
    "layout",
    "schedule",
    "rules",
    "snapshot",
    "shard",
    "consistency",
    "gathering",
    "push",
    "image",
    "operations",
    "replica",
    "standby",
)
FOREIGN_TO_SHARDS = {"ray", "grpc", "socket", "time", "asyncio", "google", "random", "protos"}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides the layer"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_a_layer_imports_only_what_lies_below(package):
    for path in files(package):
        reached = top_level(path) & set(ALLOWED)
        assert reached <= ALLOWED[package], f"{path} imports {reached - ALLOWED[package]}"


@pytest.mark.parametrize("module", TRANSPORT_FREE)
def test_shard_logic_knows_neither_ray_nor_network_nor_clock(module):
    seen: set[Path] = set()
    waiting = [ROOT / "ps" / f"{module}.py"]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        foreign = top_level(path) & FOREIGN_TO_SHARDS
        assert not foreign, f"{path} imports {foreign}"
        parents = {name.rpartition(".")[0] for name in imported(path)} | imported(path)
        candidates = (ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in parents)
        waiting += [each for each in candidates if each.is_file()]


@pytest.mark.parametrize("package", ["protos", "model", "ps", "worker"])
def test_only_the_top_layer_knows_ray(package):
    for path in files(package):
        assert "ray" not in top_level(path), path


def test_tensors_cross_no_pickle():
    """Our protocol's code never unpickles: what arrives from the network is bytes of numbers."""
    for path in files("ps"):
        assert not top_level(path) & {"pickle", "cloudpickle", "dill", "marshal"}, path
        assert "torch.load" not in path.read_text(), path
