"""Memory format, precision and compilation: what they change, and what they must not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.exc import InductorError, TritonMissing

from asynception.recipe import validate
from model.errors import InputError
from model.flat import FlatModule
from model.registry import create_model
from ps.client import ModelState
from ps.schedule import Clocks
from worker.compute import ComputeSettings, ForwardPass
from worker.data.labels import LabelLists
from worker.data.loader import Batch
from worker.evaluator import Evaluator
from worker.gradient import GradientComputer
from worker.objective import create_objective
from worker.ranking import MapDefinition

ROOT = Path(__file__).resolve().parents[2]
NUM_CLASSES = 6
OBJECTIVE = create_objective("softmax", NUM_CLASSES)
BF16_EPSILON = 2.0**-8

PLAIN = ComputeSettings(channels_last=False)
NHWC = ComputeSettings()
BF16 = ComputeSettings(precision="bfloat16")
COMPILED = ComputeSettings(compile=True)

compiles = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ here")


class SmallNet(nn.Module):
    """What matters to the settings in few layers: convolution, BN, in-place ReLU, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.dense = nn.Linear(16, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.bn(self.conv1(images)), inplace=True)
        features = self.conv2(maps).add_(maps).mean((2, 3))
        return self.dense(F.dropout(features, 0.3, self.training))


def small_net() -> FlatModule:
    torch.manual_seed(1)
    return FlatModule(SmallNet())


def small_xception() -> FlatModule:
    torch.manual_seed(1)
    return FlatModule(
        create_model("xception", NUM_CLASSES, width=0.1, middle_blocks=1, dropout=0.5)
    )


def batch_of(num_images: int, seed: int = 0) -> Batch:
    """Images whose mean brightness tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % NUM_CLASSES
    noise = torch.randint(0, 60, (num_images, 3, 40, 40), generator=generator)
    images = (noise + 38 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return Batch(images, LabelLists.from_lists([n] for n in labels.tolist()), 0, num_images, ())


class Step:
    """One step's loss, gradient and BN delta, and the model as it was left."""

    def __init__(
        self, flat: FlatModule, settings: ComputeSettings, batches: tuple[int, ...] = (12,)
    ) -> None:
        computer = GradientComputer(flat, OBJECTIVE, None, settings)
        before = flat.parameters.clone()
        for num_images in batches:
            torch.manual_seed(7)  # of dropout
            self.loss = computer.compute(batch_of(num_images)).loss
        self.gradient, self.delta = flat.gradients.clone(), computer.statistics_delta.clone()
        flat.check_views()
        assert torch.equal(flat.parameters, before), "a step only computes"
        assert self.gradient.dtype == self.delta.dtype == torch.float32

    def check_near(self, other: "Step", tolerance: float) -> None:
        """Loss, whole gradient and BN delta, relative to their sizes."""
        assert self.loss == pytest.approx(other.loss, rel=tolerance)
        for mine, others in ((self.gradient, other.gradient), (self.delta, other.delta)):
            assert others.norm() > 0
            assert (mine - others).norm() <= tolerance * others.norm()


def formats_of(flat: FlatModule, settings: ComputeSettings) -> list[bool]:
    """Whether each convolution's input and output is channels_last."""
    formats: list[bool] = []
    for part in flat.module.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(
                lambda _, inputs, output: formats.extend(
                    maps.is_contiguous(memory_format=torch.channels_last)
                    for maps in (inputs[0], output)
                )
            )
    ForwardPass(flat, settings)(batch_of(2).images)
    return formats


@pytest.mark.parametrize("model", [small_net, small_xception])
def test_channels_last_is_the_format_of_every_map_or_of_none(model):
    assert set(formats_of(model(), NHWC)) == {True}
    assert set(formats_of(model(), PLAIN)) == {False}


def test_images_are_left_alone():
    images = batch_of(3).images
    before = images.clone()
    for settings in (NHWC, PLAIN, BF16):
        ForwardPass(small_net(), settings)(images)
    assert torch.equal(images, before)
    assert images.is_contiguous()


# Batch norm over few values makes much of the last bits of a deep network.
@pytest.mark.parametrize(("model", "tolerance"), [(small_net, 1e-4), (small_xception, 1e-2)])
def test_the_memory_format_changes_only_rounding(model, tolerance):
    Step(model(), NHWC).check_near(Step(model(), PLAIN), tolerance)


def test_bfloat16_is_near_float32_and_gives_float32():
    seen: list[torch.dtype] = []
    flat = small_net()
    flat.module.dense.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    low = Step(flat, BF16)
    assert seen == [torch.bfloat16], "autocast must have been on"
    low.check_near(Step(small_net(), NHWC), 8 * BF16_EPSILON)
    assert {p.dtype for p in flat.module.parameters()} == {torch.float32}
    assert ForwardPass(flat, BF16)(batch_of(2).images).dtype == torch.float32


@pytest.mark.parametrize("settings", [NHWC, BF16], ids=["float32", "bfloat16"])
def test_a_small_training_learns(settings):
    flat = small_net()
    computer = GradientComputer(flat, OBJECTIVE, None, settings)
    torch.manual_seed(0)
    losses = []
    for step in range(60):
        losses.append(computer.compute(batch_of(18, seed=step)).loss)
        flat.parameters.sub_(flat.gradients, alpha=0.3)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("settings", [NHWC, PLAIN, BF16], ids=["nhwc", "nchw", "bfloat16"])
def test_the_seed_alone_decides_on_dropout(settings):
    first, second = Step(small_xception(), settings), Step(small_xception(), settings)
    assert first.loss == second.loss
    assert torch.equal(first.gradient, second.gradient)


# Compilation. Tracing, aliases and changed buffers show with a backend that compiles nothing and
# is quick; one small network goes through the real one.


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, options: real(module, backend="aot_eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_traced_step_leaves_all_in_the_flat_vectors(precision):
    """Three batches, of two sizes: zeroed gradients, a graph for any batch size."""
    compiled, plain = (ComputeSettings(precision=precision, compile=c) for c in (True, False))
    sizes = (12, 12, 7)
    Step(small_net(), compiled, sizes).check_near(
        Step(small_net(), plain, sizes), 1e-5 if precision == "float32" else 2 * BF16_EPSILON
    )


@pytest.mark.usefixtures("traced")
def test_xception_can_be_traced():
    flat = FlatModule(create_model("xception", NUM_CLASSES, width=0.05, middle_blocks=0))
    images = batch_of(4).images
    with torch.no_grad():
        traced, plain = (ForwardPass(flat, settings)(images) for settings in (COMPILED, NHWC))
    torch.testing.assert_close(traced, plain)


@pytest.mark.usefixtures("traced")
def test_a_traced_network_sees_what_is_pulled():
    flat = small_net()
    forward = ForwardPass(flat, COMPILED)
    flat.module.eval()
    with torch.no_grad():
        before = forward(batch_of(2).images)
        flat.parameters.mul_(0.5)
        flat.statistics.add_(0.25)
        expected = ForwardPass(flat, NHWC)(batch_of(2).images)
        assert not torch.allclose(before, expected)
        torch.testing.assert_close(forward(batch_of(2).images), expected)


@compiles
def test_a_compiled_step_is_the_plain_one_dropout_included():
    torch._dynamo.reset()
    Step(small_net(), COMPILED, (12, 12)).check_near(Step(small_net(), NHWC, (12, 12)), 1e-4)
    torch._dynamo.reset()


WITHOUT_COMPILER = """
import torch
from model.errors import InputError
from model.flat import FlatModule
from worker.compute import ComputeSettings, ForwardPass
try:
    flat = FlatModule(torch.nn.Linear(2, 2))
    ForwardPass(flat, ComputeSettings(compile=True))(torch.zeros(2, 3, 2, 2, dtype=torch.uint8))
except InputError as error:
    print(error)
"""


def test_a_missing_compiler_is_said_in_one_line(tmp_path):
    """In a process of its own: torch looks for its compiler once."""
    environment = {
        "CXX": "/no/such/compiler",
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert "compute.compile = true" in line
    assert "/no/such/compiler" in line
    assert "set compute.compile to false" in line


def failing_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> ForwardPass:
    """A pass whose compilation ends so."""

    def fail(_images: Tensor) -> None:
        raise error

    monkeypatch.setattr(torch, "compile", lambda module, options: fail)
    return ForwardPass(small_net(), COMPILED)


def test_missing_triton_is_said_in_one_line(monkeypatch):
    forward = failing_with(TritonMissing(None), monkeypatch)
    with pytest.raises(InputError, match=r"compute\.compile = true.*install triton"):
        forward(batch_of(2).images)


def test_what_no_compiler_would_mend_is_raised_as_it_is(monkeypatch):
    error = InductorError(RuntimeError("a mistake in torch"), None)
    with pytest.raises(InductorError) as raised:
        failing_with(error, monkeypatch)(batch_of(2).images)
    assert raised.value is error


# Evaluation


class OneBatch:
    """Stands in for a loader."""

    def batches(self, _leases: object) -> list[Batch]:
        return [batch_of(12)]


def evaluated(settings: ComputeSettings) -> dict[str, float]:
    flat = small_net()
    vectors = {"ema": flat.parameters.clone(), "ema_statistics": flat.statistics.clone()}
    evaluator = Evaluator(flat, OBJECTIVE, OneBatch(), 12, MapDefinition(3), settings)
    return evaluator.evaluate(ModelState(Clocks(0, 0), vectors, {}))


def test_evaluations_are_in_float32_whatever_the_precision():
    assert evaluated(BF16) == evaluated(NHWC)


@pytest.mark.usefixtures("traced")
def test_evaluations_can_be_compiled():
    assert evaluated(COMPILED)["loss"] == pytest.approx(evaluated(NHWC)["loss"], rel=1e-5)


# Settings


def test_a_recipe_sets_them_and_names_what_is_wrong():
    tree = {"data": {"train": "a", "val": "b"}, "training": {"epochs": 1}}
    config = validate({**tree, "compute": {"precision": "bfloat16", "compile": True}})
    assert config.compute == ComputeSettings(precision="bfloat16", compile=True)
    assert validate(tree).compute == ComputeSettings()
    with pytest.raises(InputError, match=r"compute\.precision = 'half'.*'float32' or 'bfloat16'"):
        validate({**tree, "compute": {"precision": "half"}})
