"""Commands and processes that compute nothing start without torch, which takes seconds to import.

Each program runs in a process of its own, with nothing imported yet.
"""

import pickle
import subprocess
import sys

import pytest

from asynception.ledger import BatchLeases, Ledger, WindowLeases
from asynception.monitoring.monitor import Monitor
from asynception.recipe import save_config, validate
from asynception.totals import Progress, Totals
from ps.receipts import Outcome, Receipt, Settled
from worker.data.order import EpochOrder
from worker.step_report import GradientSummary, StepReport

HEAVY = {"torch", "ray", "numba", "matplotlib"}
UNUSED = HEAVY | {"numpy", "pydantic", "grpc"}
"""By commands that show help, or what a file says."""

COORDINATOR = """
import pickle, sys
from pathlib import Path
from asynception.journal import Journal, JournaledCoordinator
ledger, totals, steps, settled = pickle.loads(bytes.fromhex(sys.argv[1]))
journal = Journal(Path(sys.argv[2]))
journal.create()
control = JournaledCoordinator(ledger, totals, journal)
control.enlist(0)
assert control.lease(0, 0) is not None
control.report(0, 0, steps)
assert control.progress().totals.pushes == 1
control.end(0, settled)
"""

COMMANDS = """
import sys
from click.testing import CliRunner
from asynception.cli import main
for words in (["--help"], ["--version"], ["data", "--help"], ["doctor", "--help"], ["trian"]):
    result = CliRunner().invoke(main, words)
    assert result.exit_code == (2 if words == ["trian"] else 0), result.output
"""

WATCHING = """
import sys
from click.testing import CliRunner
from asynception.cli import main
shown = CliRunner().invoke(main, ["status", sys.argv[1]])
assert (shown.exit_code, "finished" in shown.output) == (0, True), shown.output
asked = CliRunner().invoke(main, ["scale", sys.argv[1], "--num-workers", "3"])
assert (asked.exit_code, "so it has no workers" in asked.output) == (2, True), asked.output
"""

PLANNING = """
import sys
from asynception.config import TrainConfig
from asynception.plan import plan_model
from model.errors import InputError

def config(name, image_size):
    data = {"train": "/a", "val": "/b", "image_size": image_size}
    sections = {"model": {"name": name}, "data": data, "training": {"epochs": 1}}
    return TrainConfig.model_validate(sections)

for name in ("xception", "inception_v3", "inception_v3_2016"):
    assert plan_model(config(name, 80), 7).num_parameters > 1_000_000
try:
    plan_model(config("inception_v3", 40), 7)
except InputError as error:
    assert "40x40 pixels vanish" in str(error)
else:
    raise AssertionError("an image that is too small")
"""

NAMES = """
import sys
import asynception
assert set(asynception.__all__) <= set(dir(asynception))
try:
    asynception.Trianer
except AttributeError as error:
    assert "Trianer" in str(error)
else:
    raise AssertionError("a name that is not there")
"""

IMPORTED = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def imported_by(program: str, *arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", program + IMPORTED, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("program", [COMMANDS, NAMES], ids=["commands", "names"])
def test_what_computes_nothing_imports_nothing_heavy(program):
    imported = imported_by(program)
    assert "asynception" in imported
    assert not imported & UNUSED


def test_a_run_is_watched_and_asked_in_its_folder_without_anything_heavy(tmp_path):
    config = validate({"data": {"train": "t", "val": "v"}, "training": {"samples": 10}})
    save_config(config, tmp_path)
    monitor = Monitor(tmp_path, config, 10)
    for time_s in (0.0, 10.0):
        monitor.progress(time_s, Progress(10, Totals(), {0: 0.5}, finished=time_s > 0))
    monitor.conclude("finished")
    assert not imported_by(WATCHING, str(tmp_path)) & UNUSED


@pytest.mark.parametrize(
    "leases", [BatchLeases(2, 2), WindowLeases(EpochOrder([8, 8], 0, 4))], ids=["batch", "window"]
)
def test_all_that_a_coordinator_is_sent_can_be_read_without_torch(leases, tmp_path):
    receipt = Receipt(Outcome.APPLIED, 1, 0, 0.1)
    steps = [StepReport(0, 2, (), GradientSummary(1.5, 2.0), (receipt,), lanes=("shm",))]
    sent = (Ledger(16, 2, leases), Totals(), steps, Settled(0, 0))
    imported = imported_by(COORDINATOR, pickle.dumps(sent).hex(), str(tmp_path / "journal"))
    assert not imported & HEAVY


def test_every_name_of_the_package_can_be_had():
    import asynception

    for name in asynception.__all__:
        assert getattr(asynception, name).__name__ == name


def test_a_model_is_planned_without_torch_s_compiler_and_algebra():
    """A pass on the meta device, by which shapes are learnt elsewhere, would import both."""
    imported = imported_by(PLANNING)
    assert "torch" in imported
    assert "sympy" not in imported, "torch._dynamo imports it"
