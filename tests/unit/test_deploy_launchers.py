"""Image, `ray up`, Slurm: what can be known of them without Docker, a cloud or a cluster."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from deploy_rendering import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

DEPLOY = ROOT / "deploy"
CLOUDS = ("aws", "gcp")


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest) of the Dockerfile, with continued lines joined."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def copied() -> list[str]:
    """Paths of the repository that the image is made of."""
    paths = []
    for name, rest in instructions():
        words = [word for word in rest.split() if not word.startswith("--")]
        if name == "COPY" and "--from" not in rest:
            paths += words[:-1]
    return paths


def test_all_that_the_image_copies_is_there_and_let_through():
    ignored = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    for path in copied():
        assert (ROOT / path).exists()
        assert f"!{path}" in ignored
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert allowed == set(copied())


def test_the_image_has_every_package_of_the_project():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    files = [project["project"]["readme"], *project["project"]["license-files"]]
    assert {*packages, *files} <= set(copied())


def test_the_image_runs_as_a_user_without_a_compiler():
    made = instructions()
    names = [name for name, _ in made]
    last_stage = made[len(names) - names[::-1].index("FROM") :]
    assert [rest for name, rest in last_stage if name == "USER"] == ["1000:1000"]
    assert "useradd --uid 1000" in str(last_stage)
    (install,) = [rest for name, rest in made if "pip install" in rest]
    assert "--only-binary :all:" in install
    assert "--constraint constraints.txt" in install
    everything = " ".join(rest for _, rest in made)
    assert not re.search(r"\b(gcc|g\+\+|build-essential|clang|-devel-)\b", everything)
    bases = [rest.split()[-1] for name, rest in made if name == "FROM" and " AS " in rest]
    assert {"base-cuda", "base-cpu"} <= set(bases)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_up_takes_the_cluster_file(cloud):
    config = yaml.safe_load((DEPLOY / "ray" / f"{cloud}.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types["servers"]["resources"]["asynception_server"] == 1
    assert types["workers"]["resources"]["asynception_worker"] == 1
    assert types["workers"]["max_workers"] > types["workers"]["min_workers"] == 0
    # Room for the servers and all the workers at once.
    workers = sum(t["max_workers"] for name, t in types.items() if name != "head")
    assert workers <= prepared["max_workers"]


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("path", ["", "docker", "available_node_types.servers"])
def test_ray_finds_a_misspelt_key_of_the_cluster_file(cloud, path):
    config = yaml.safe_load((DEPLOY / "ray" / f"{cloud}.yaml").read_text())
    place = config
    for key in path.split(".") if path else ():
        place = place[key]
    place["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        validate_config(prepare_config(config))


def assert_ray_start_takes(arguments: list[str]) -> None:
    start.make_context("start", list(arguments))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_start_takes_the_options_of_the_cluster_file(cloud):
    config = yaml.safe_load((DEPLOY / "ray" / f"{cloud}.yaml").read_text())
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        stop, begin = config[key]
        assert stop == "ray stop"
        assert shlex.split(begin)[:2] == ["ray", "start"]
        assert_ray_start_takes(shlex.split(begin)[2:])


@pytest.fixture
def fakes(tmp_path):
    """Programs that say how they were called, and a virtual environment for the script."""
    programs = {
        "scontrol": 'printf "node1\\nnode2\\n"',
        "hostname": 'echo "127.0.1.1 fe80::1 10.0.0.7"',
        # Options up to the program, then the program.
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "ray": 'printf "%s\\0" ray "$@" > "$CALLED"; env > "$CALLED.env"',
        "asynception": 'printf "%s\\0" "$@" > "$CALLED"',
    }
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    activate = tmp_path / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CALLED": str(tmp_path / "called"),
        "VENV": str(tmp_path / "venv"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "42",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_ON_NODE": "4",
    }


def called(fakes) -> list[str]:
    return Path(fakes["CALLED"]).read_text().split("\0")[:-1]


def test_the_slurm_script_starts_ray_on_every_node_and_the_run_on_one(fakes, monkeypatch):
    script = DEPLOY / "slurm" / "train.sbatch"
    subprocess.run(
        [script, "my recipe.toml", "/runs", "--training.epochs", "2"],
        env=fakes,
        check=True,
        timeout=30,
    )
    ray, command, *rest = called(fakes)
    assert (ray, command) == ("ray", "symmetric-run")
    cut = rest.index("--")
    options, entrypoint = rest[:cut], rest[cut + 1 :]
    assert options[:4] == ["--address", "10.0.0.7:6379", "--min-nodes", "2"]
    started = curate_and_validate_ray_start_args(options)
    assert_ray_start_takes(started)
    (resources,) = [o.partition("=")[2] for o in started if o.startswith("--resources")]
    assert json.loads(resources) == {"asynception_server": 1, "asynception_worker": 4}
    assert Path(entrypoint[0]).samefile(DEPLOY / "train_or_resume.sh")
    assert entrypoint[1:4] == ["my recipe.toml", "/runs", "slurm-42"]
    assert entrypoint[-2:] == ["--training.epochs", "2"]
    environment = Path(fakes["CALLED"] + ".env").read_text()
    assert re.search(r"^RAY_AUTH_TOKEN=[0-9a-f]{64}$", environment, re.M)


def test_slurm_reads_the_options_at_the_top_of_the_script():
    lines = (DEPLOY / "slurm" / "train.sbatch").read_text().splitlines()
    numbers = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert numbers
    assert max(numbers) < first_command
    assert "#SBATCH --ntasks-per-node=1" in lines


def test_a_run_is_begun_once_and_then_gone_on_with(fakes, tmp_path):
    script = DEPLOY / "train_or_resume.sh"
    arguments = ["recipe.toml", str(tmp_path), "first", "--ray.address", "auto"]
    subprocess.run([script, *arguments], env=fakes, check=True, timeout=30)
    begun = ["train", "recipe.toml", "--run.storage_path", str(tmp_path), "--run.name", "first"]
    assert called(fakes) == [*begun, "--ray.address", "auto"]
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.toml").write_text("")
    subprocess.run([script, *arguments], env=fakes, check=True, timeout=30)
    resumed = ["train", str(tmp_path / "first"), "--resume", "--ray.address", "auto"]
    assert called(fakes) == resumed
