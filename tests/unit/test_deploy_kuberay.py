"""The manifests of deploy/kuberay against KubeRay's own schemas, Ray's autoscaler and each run."""

import ast
import copy
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from deploy_rendering import (
    NAMES,
    OVERLAYS,
    ROOT,
    Manifest,
    kustomize_command,
    load,
    render,
    render_by_program,
    render_here,
)
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.kuberay.utils import parse_quantity

from asynception.plan import ModelPlan, plan_model
from asynception.recipe import load_config

CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay"))
FILES = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
OVERHEAD_NUM_BYTES = 1 << 30
"""Of a pod's memory, for Ray's processes and Python."""

SIZES = [name for name in NAMES if not name.endswith("-job")]


def strict(schema: Manifest) -> Manifest:
    """A structural schema that refuses what the API server would drop: fields it doesn't name."""
    made = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: strict(each) for name, each in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            made[key] = strict(value)
        else:
            made[key] = value
    kept = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if schema.get("type") == "object" and "additionalProperties" not in schema and not kept:
        made["additionalProperties"] = False
    return made


def _schema(kind: str) -> Manifest:
    path = CRDS / FILES[kind]
    if not path.is_file():
        pytest.skip(f"no {path}: set KUBERAY_CRDS to a folder with KubeRay's CRDs")
    (crd,) = load(path)
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1" and v["served"]]
    made = strict(version["schema"]["openAPIV3Schema"])
    text = {"type": "object", "additionalProperties": {"type": "string"}}
    metadata = {"name": {"type": "string"}, "labels": text, "annotations": text}
    made["properties"]["metadata"] |= {"properties": metadata, "required": ["name"]}
    return made


@pytest.fixture(scope="module")
def schemas() -> dict[str, Manifest]:
    return {kind: _schema(kind) for kind in FILES}


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Manifest]]:
    return {name: render(name) for name in NAMES}


def one(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = [m for m in manifests if m["kind"] == kind]
    return found


def cluster_spec(manifests: list[Manifest]) -> Manifest:
    """Of the cluster, or of the one that the job makes."""
    (found,) = [m for m in manifests if m["kind"] in FILES]
    return found["spec"].get("rayClusterSpec", found["spec"])


def check(schemas: dict[str, Manifest], manifest: Manifest) -> None:
    validator = jsonschema.Draft202012Validator(schemas[manifest["kind"]])
    assert not [f"{e.json_path}: {e.message}" for e in validator.iter_errors(manifest)]


def groups(spec: Manifest) -> Iterator[Manifest]:
    yield spec["headGroupSpec"]
    yield from spec["workerGroupSpecs"]


def pods(spec: Manifest) -> Iterator[Manifest]:
    for group in groups(spec):
        yield group["template"]


@pytest.mark.parametrize("overlay", NAMES)
def test_manifests_are_what_kuberay_accepts(schemas, rendered, overlay):
    kinds = [m["kind"] for m in rendered[overlay]]
    assert ("RayJob" if overlay.endswith("-job") else "RayCluster") in kinds
    for manifest in rendered[overlay]:
        if manifest["kind"] in FILES:
            check(schemas, manifest)


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Of every mapping in a manifest."""
    if isinstance(value, dict):
        yield path
        for key, each in value.items():
            yield from paths(each, (*path, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from paths(each, (*path, index))


FREE = {"labels", "matchLabels", "requests", "limits", "rayStartParams"}
"""Mappings whose keys are the user's."""


def test_a_misspelt_field_is_found_wherever_it_is(schemas, rendered):
    """Of one manifest, each mapping in turn gets a field that KubeRay doesn't know."""
    manifest = one(rendered["small-job"], "RayJob")
    checked = 0
    # Each mapping on its own, under the schema of its place: the whole takes too long so often.
    for path in paths(manifest):
        value, schema = manifest, schemas["RayJob"]
        for key in path:
            value = value[key]
            if isinstance(key, int):
                schema = schema["items"]
            else:
                schema = schema["properties"].get(key) if "properties" in schema else None
            if schema is None:
                break
        if not path or path[-1] in FREE or schema is None:
            continue
        found = jsonschema.Draft202012Validator(schema).iter_errors({**value, "misspelt": 1})
        assert [error for error in found if "misspelt" in error.message], path
        checked += 1
    assert checked > 60
    broken = copy.deepcopy(manifest)
    broken["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["minReplica"] = 1
    with pytest.raises(AssertionError, match="minReplica"):
        check(schemas, broken)


def test_other_kinds_fit_the_schemas_that_kuberay_embeds(schemas, rendered):
    """NetworkPolicy's rules and a claim's spec occur inside RayCluster's own schema."""
    spec = schemas["RayCluster"]["properties"]["spec"]["properties"]
    rules = spec["networkPolicy"]["properties"]["head"]["properties"]["ingressRules"]
    pod = spec["headGroupSpec"]["properties"]["template"]["properties"]["spec"]["properties"]
    ephemeral = pod["volumes"]["items"]["properties"]["ephemeral"]["properties"]
    claim = ephemeral["volumeClaimTemplate"]["properties"]["spec"]
    for manifests in rendered.values():
        policy, volume = one(manifests, "NetworkPolicy"), one(manifests, "PersistentVolumeClaim")
        jsonschema.validate(policy["spec"]["ingress"], rules)
        assert policy["spec"].keys() == {"podSelector", "policyTypes", "ingress"}
        jsonschema.validate(volume["spec"], claim)


@pytest.mark.skipif(kustomize_command() is None, reason="no kustomize and no kubectl here")
@pytest.mark.parametrize("overlay", NAMES)
def test_kustomize_renders_what_this_renderer_does(overlay):
    def sort(manifests):
        return sorted(manifests, key=lambda m: (m["kind"], m["metadata"]["name"]))

    assert sort(render_by_program(overlay)) == sort(render_here(OVERLAYS / overlay))


@pytest.mark.parametrize("size", SIZES)
def test_a_job_makes_the_cluster_that_its_size_says(rendered, size):
    job = rendered[f"{size}-job"]
    assert cluster_spec(job) == cluster_spec(rendered[size])
    assert not [m for m in job if m["kind"] == "RayCluster"]


def test_pods_are_safe_and_whole(rendered):
    for manifests in rendered.values():
        spec = cluster_spec(manifests)
        policy = one(manifests, "NetworkPolicy")["spec"]
        selected = policy["podSelector"]["matchLabels"]
        templates = list(pods(spec))
        if "rayClusterSpec" in (m := next(m for m in manifests if m["kind"] in FILES))["spec"]:
            templates.append(m["spec"]["submitterPodTemplate"])
        for pod in templates:
            assert selected.items() <= pod["metadata"]["labels"].items()
            assert pod["spec"]["securityContext"]["runAsNonRoot"]
            assert pod["spec"]["securityContext"]["runAsUser"] == 1000  # the image's
            volumes = {volume["name"] for volume in pod["spec"].get("volumes", ())}
            for container in pod["spec"]["containers"]:
                assert not container["securityContext"]["allowPrivilegeEscalation"]
                assert {m["name"] for m in container.get("volumeMounts", ())} == volumes
        assert spec["authOptions"] == {"mode": "token", "secretName": "asynception-token"}
        assert {m["metadata"]["name"] for m in manifests if m["kind"] == "ConfigMap"} == {
            "asynception-recipe"
        }


def public_paths() -> list[str]:
    """What Ray's agent answers to anyone. Read, since its imports need ray[default]."""
    (folder,) = importlib.util.find_spec("ray").submodule_search_locations
    text = (Path(folder) / "dashboard" / "http_server_agent.py").read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and node.targets[0].id == "PUBLIC_EXACT_PATHS":
            return ast.literal_eval(node.value)
    raise AssertionError("Ray's agent has no list of public paths")


def test_every_ray_pod_is_probed_where_ray_answers_without_a_token(rendered):
    public = public_paths()
    for manifests in rendered.values():
        for pod in pods(cluster_spec(manifests)):
            container = pod["spec"]["containers"][0]
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container[kind]["httpGet"]
                assert asked["path"] in public
                assert asked["port"] == 52365


def test_memory_of_a_pod_covers_what_ray_hands_out(rendered):
    for manifests in rendered.values():
        for group in groups(cluster_spec(manifests)):
            params, pod = group["rayStartParams"], group["template"]["spec"]
            limit = int(parse_quantity(pod["containers"][0]["resources"]["limits"]["memory"]))
            store = int(params["object-store-memory"])
            assert int(params["memory"]) + store + OVERHEAD_NUM_BYTES <= limit
            (mount,) = [
                m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm"
            ]
            (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
            assert volume["emptyDir"]["medium"] == "Memory"
            assert int(parse_quantity(volume["emptyDir"]["sizeLimit"])) >= store


def test_the_cluster_has_the_ray_that_is_tested(rendered):
    pinned = (ROOT / "constraints.txt").read_text().split()
    for manifests in rendered.values():
        assert f"ray=={cluster_spec(manifests)['rayVersion']}" in pinned


@functools.cache
def plan_of(size: str) -> ModelPlan:
    config = load_config(OVERLAYS / size / "recipe.toml")
    assert config.data.num_classes
    return plan_model(config, config.data.num_classes)


def node_types(manifests: list[Manifest]) -> dict[str, Manifest]:
    """What Ray's autoscaler makes of the manifest: resources, and how many nodes of each type."""
    cluster = {
        "metadata": {"name": "asynception", "namespace": "default"},
        "spec": cluster_spec(manifests),
    }
    return _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]


@pytest.mark.parametrize("size", SIZES)
def test_every_part_of_the_run_has_its_place_and_no_other(rendered, size):
    """A server fits a pod of servers alone, and only once, and so on; the largest cluster that
    the autoscaler may start has room for all."""
    plan, types = plan_of(size), node_types(rendered[size])
    scaling, evaluation = plan.config.scaling, plan.config.evaluation
    largest = max(plan.server_num_bytes(shard) for shard in range(scaling.num_servers))
    worker_num_bytes = plan.worker_num_bytes()
    asked = {
        "servers": ({"memory": largest, **scaling.resources_per_server}, scaling.num_servers),
        "workers": ({"memory": worker_num_bytes, **scaling.worker_resources}, scaling.num_workers),
        "headgroup": ({"memory": worker_num_bytes, "CPU": evaluation.cpus}, 1),
    }
    for place, (bundle, count) in asked.items():
        fits = {name for name, t in types.items() if _times(bundle, t["resources"])}
        if place == "headgroup":  # others' CPUs would do, were they not all taken by their own
            fits -= {
                name for name in ("servers", "workers") if _takes_all_cpus(asked[name], types[name])
            }
        assert fits == {place}
        times = _times(bundle, types[place]["resources"])
        nodes = 1 if place == "headgroup" else types[place]["max_workers"]
        assert times == 1
        assert nodes * times >= count


def _times(bundle: dict[str, float], resources: dict[str, float]) -> int:
    """How often a node has what a part of the run asks for."""
    return int(min(resources.get(name, 0) // amount for name, amount in bundle.items() if amount))


def _takes_all_cpus(asked: tuple[dict[str, float], int], node_type: Manifest) -> bool:
    return asked[0]["CPU"] == node_type["resources"]["CPU"]


def test_the_large_overlay_changes_what_it_says(rendered):
    small, large = (node_types(rendered[size]) for size in SIZES[::-1])
    assert small["workers"]["max_workers"] == 4
    assert large["workers"]["max_workers"] == 60
    assert large["servers"]["min_workers"] == large["servers"]["max_workers"] == 8


def test_the_figures_that_are_told_are_those_of_the_recipe():
    plan = plan_of("large")
    largest = max(plan.server_num_bytes(shard) for shard in range(plan.config.scaling.num_servers))
    figure = f"{largest / 1e6:,.0f} MB"
    assert figure in (ROOT / "docs" / "deploy" / "kuberay.md").read_text()
    assert figure in (OVERLAYS / "large" / "size.yaml").read_text()
