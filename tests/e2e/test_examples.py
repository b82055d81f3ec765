"""The tutorial and the examples do what they say, as they stand."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from processes import Command

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
]

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
DEADLINE_S = 600.0
"""The tutorial starts five programs, and Ray for two of them."""
CHANCE = 1 / 3
"""Top-1 of a guess among three shapes."""

_SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_the_tutorial_works_as_it_stands(tmp_path):
    shapes = tmp_path / "shapes"
    shutil.copytree(ROOT / "examples" / "shapes", shapes)
    script = "\n".join(_SHELL.findall((ROOT / "docs" / "tutorial.md").read_text()))
    assert script.count("asynception ") == 5
    outcome = Command(shapes, "bash", "-exc", script, env={"PATH": PATH}).wait(DEADLINE_S)
    assert outcome.code == 0, str(outcome)
    first = result(shapes / "runs" / "first")
    assert first["status"] == "finished"
    assert 0 <= first["samples"] - 5 * 1800 < 32, "resumed up to epoch 5, in whole batches"
    assert first["eval"]["top1"] > 2 * CHANCE
    assert (shapes / "shapes.safetensors").is_file()


def test_a_ray_program_trains_a_data_set_of_its_own(tmp_path):
    program, recipe = ROOT / "examples" / "embedded.py", ROOT / "examples" / "stripes.toml"
    # Or else it would find the Ray of other tests, by a file in /tmp/ray.
    alone = {"RAY_ADDRESS": "local"}
    command = Command(tmp_path, sys.executable, str(program), str(recipe), env=alone)
    outcome = command.wait(DEADLINE_S)
    assert outcome.code == 0, str(outcome)
    rates = re.findall(r"learning rate (\S+): top-1 (\S+) in (\S+)", outcome.stdout)
    assert len(rates) == 2
    best = max(rates, key=lambda each: float(each[1]))
    assert float(best[1]) > 2 / 8
    assert f"the best is {best[2]}, " in outcome.stdout
