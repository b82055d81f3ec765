"""What CONTRIBUTING.md asks of every file, as far as a program can see it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "ps", "worker", "asynception")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
OTHERS = sorted(path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py"))
GENERATED = ("parameter_server_pb2.py", "parameter_server_pb2.pyi", "parameter_server_pb2_grpc.py")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
VAGUE = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small_and_named_for_what_they_do(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert path.stem not in VAGUE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_files_of_tests_and_benchmarks_are_small_and_named_for_what_they_do():
    assert len(OTHERS) > 100
    assert not [path for path in OTHERS if len(path.read_text().splitlines()) > MAX_FILE_LINES]
    assert not [path for path in OTHERS if path.stem in VAGUE]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(path):
    if path.name not in ("__init__.py", "__main__.py"):
        assert ast.get_docstring(ast.parse(path.read_text()))


def test_generated_protobuf_code_is_current(tmp_path):
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}"]
    command += [f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
    subprocess.run([*command, "protos/parameter_server.proto"], cwd=ROOT, check=True)
    for name in GENERATED:
        fresh, kept = (tmp_path / "protos" / name).read_text(), (ROOT / "protos" / name).read_text()
        assert fresh == kept, f"protos/{name} is stale: run `make proto`"
