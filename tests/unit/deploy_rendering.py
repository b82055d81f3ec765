"""Deployment manifests as Kubernetes would get them: overlays rendered by kustomize or, where no
binary has it, by the few of its features that deploy/kuberay uses."""

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ROOT / "deploy" / "kuberay" / "overlays"
NAMES = sorted(path.name for path in OVERLAYS.iterdir())

Manifest = dict[str, Any]
Json = Any


def load(path: Path) -> list[Any]:
    """The documents of a YAML file."""
    return list(yaml.load_all(path.read_text(), yaml.CSafeLoader))


def kustomize_command() -> list[str] | None:
    """The program that renders a folder, if there is one."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


def render(overlay: str) -> list[Manifest]:
    """The manifests of an overlay, by whichever way there is here."""
    return render_by_program(overlay) if kustomize_command() else render_here(OVERLAYS / overlay)


def render_by_program(overlay: str) -> list[Manifest]:
    """By kustomize itself."""
    command = kustomize_command()
    assert command
    done = subprocess.run(
        [*command, str(OVERLAYS / overlay)], capture_output=True, text=True, check=True, timeout=30
    )
    return [m for m in yaml.load_all(done.stdout, yaml.CSafeLoader) if m]


KNOWN = {
    "apiVersion",
    "kind",
    "resources",
    "components",
    "configMapGenerator",
    "generatorOptions",
    "images",
    "patches",
    "replacements",
}


def render_here(folder: Path) -> list[Manifest]:
    """In kustomize's order: resources, generators, components, patches, images, replacements."""
    return _extended([], folder)


def _extended(manifests: list[Manifest], folder: Path) -> list[Manifest]:
    (file,) = load(folder / "kustomization.yaml")
    assert file.keys() <= KNOWN, f"{folder}: this renderer knows no {file.keys() - KNOWN}"
    for name in file.get("resources", ()):
        path = folder / name
        manifests = manifests + (_extended([], path) if path.is_dir() else load(path))
    manifests = manifests + [_config_map(each, folder) for each in _generated(file)]
    for name in file.get("components", ()):
        manifests = _extended(manifests, folder / name)
    for patch in file.get("patches", ()):
        manifests = _patched(manifests, patch, folder)
    for image in file.get("images", ()):
        manifests = [_with_image(m, image) for m in manifests]
    for replacement in file.get("replacements", ()):
        _replace(manifests, replacement)
    return manifests


def _generated(file: Manifest) -> list[Manifest]:
    found = file.get("configMapGenerator", [])
    assert not found or file["generatorOptions"] == {"disableNameSuffixHash": True}
    return found


def _config_map(generator: Manifest, folder: Path) -> Manifest:
    data = {name: (folder / name).read_text() for name in generator["files"]}
    metadata = {"name": generator["name"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _patched(manifests: list[Manifest], patch: Manifest, folder: Path) -> list[Manifest]:
    if "patch" in patch:  # strategic merges delete and nothing else
        deleted = yaml.safe_load(patch["patch"])
        assert deleted.pop("$patch") == "delete"
        assert deleted.keys() == {"apiVersion", "kind", "metadata"}
        kept = [m for m in manifests if not _is(m, deleted)]
        assert len(kept) == len(manifests) - 1
        return kept
    jsonpatch = pytest.importorskip("jsonpatch", reason="no kustomize, no kubectl, no jsonpatch")
    (operations,) = load(folder / patch["path"])
    kind = patch["target"]["kind"]
    assert any(m["kind"] == kind for m in manifests)
    return [jsonpatch.apply_patch(m, operations) if m["kind"] == kind else m for m in manifests]


def _is(manifest: Manifest, other: Manifest) -> bool:
    named = manifest["metadata"]["name"] == other["metadata"]["name"]
    return named and manifest["kind"] == other["kind"]


def _with_image(value: Json, image: dict[str, str]) -> Json:
    if isinstance(value, list):
        return [_with_image(each, image) for each in value]
    if not isinstance(value, dict):
        return value
    made = {key: _with_image(each, image) for key, each in value.items()}
    name = made.get("image")
    if isinstance(name, str) and name.partition(":")[0] == image["name"]:
        made["image"] = f"{image['newName']}:{image['newTag']}"
    return made


def _replace(manifests: list[Manifest], replacement: Manifest) -> None:
    source = replacement["source"]
    (value,) = [m[source["fieldPath"]] for m in manifests if m["kind"] == source["kind"]]
    for target in replacement["targets"]:
        (manifest,) = [m for m in manifests if m["kind"] == target["select"]["kind"]]
        for path in target["fieldPaths"]:
            *parents, key = path.split(".")
            for parent in parents:
                manifest = manifest[parent]
            manifest[key] = copy.deepcopy(value)
