"""What `asynception export` writes: each format computes what the run's checkpoint does."""

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import asynception.export as export_module
from asynception import cli
from asynception.cli import main
from asynception.config import TrainConfig
from asynception.export import NOTES, Format, export_saved, replacing, trace
from asynception.plan import first_state, plan_model
from asynception.recipe import save_config
from asynception.run_folder import CHECKPOINTS
from asynception.saved import find_checkpoint
from model.errors import InputError
from model.flat import ALIGNMENT, named_views
from model.registry import create_model
from ps.checkpoint import write_checkpoint
from ps.client import ModelState

NUM_CLASSES, SIZE = 3, 40
SETTINGS = {"width": 0.05, "middle_blocks": 1}
FORMATS = ("safetensors", "torch-export", "onnx")
BATCHES = (1, 5)

FACTORY = """
import torch

class Doubtful(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.dense = torch.nn.Linear(3, num_classes)

    def forward(self, images):
        features = images.mean(dim=(2, 3))
        return self.dense(features if not features.is_meta and features.sum() > 0 else -features)
"""


def write_run(folder: Path, model: dict[str, object]) -> Path:
    """A run's folder with one checkpoint of random values, EMA and parameters unlike."""
    config = TrainConfig.model_validate(
        {
            "model": model,
            "data": {"train": "gone", "val": "gone", "image_size": SIZE},
            "training": {"epochs": 1},
            "run": {"storage_path": str(folder.parent), "name": folder.name},
        }
    )
    plan = plan_model(config, NUM_CLASSES)
    state = first_state(plan)
    generator = torch.Generator().manual_seed(1)
    for name in ("parameters", "ema", "statistics", "ema_statistics"):
        segments = getattr(plan.tensors, "statistics" if "stat" in name else "parameters")
        for tensor, view in named_views(state.vectors[name], segments).items():
            if tensor.endswith("running_var"):
                view.uniform_(0.15, 0.3, generator=generator)  # logits of about 1
            elif not tensor.endswith("running_mean"):
                view.add_(torch.randn(view.shape, generator=generator), alpha=0.1)
    folder.mkdir()
    save_config(config, folder)
    write_checkpoint(folder / CHECKPOINTS, state, plan.tensors, {"num_classes": NUM_CLASSES})
    STATES[folder] = state
    return folder


STATES: dict[Path, ModelState] = {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", {"name": "xception", **SETTINGS})


def reference(run: Path, prefix: str) -> nn.Module:
    """The model that a checkpoint's vectors make, by another way than the exporter's."""
    model = create_model("xception", NUM_CLASSES, **SETTINGS).eval()
    statistics = "ema_statistics" if prefix == "ema" else "statistics"
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    for name, tensors in ((prefix, model.parameters()), (statistics, buffers)):
        vector, start = STATES[run].vectors[name], 0
        for tensor in tensors:
            values = vector[start : start + tensor.numel()]
            tensor.data.copy_(values.view(tensor.shape))
            start += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
    return model


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)


def export(*arguments: object) -> Result:
    result = call("export", *arguments)
    assert result.exit_code == 0, result.output
    return result


def refusal(*arguments: object) -> str:
    result = call("export", *arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1, result.output
    return result.output


def run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    onnx.checker.check_model(onnx.load(path), full_check=True)
    evaluator = ReferenceEvaluator(str(path))

    def compute(images: Tensor) -> Tensor:
        (logits,) = evaluator.run(["logits"], {"images": images.numpy()})
        assert logits.dtype == np.float32
        return torch.from_numpy(logits)

    return compute


def load_state_dict(path: Path) -> Callable[[Tensor], Tensor]:
    model = create_model("xception", NUM_CLASSES, **SETTINGS).eval()
    model.load_state_dict(load_file(path), strict=True)
    return model


LOADERS: dict[str, Callable[[Path], Callable[[Tensor], Tensor]]] = {
    "safetensors": load_state_dict,
    "torch-export": lambda path: torch.export.load(path).module(),
    "onnx": run_onnx,
}
SUFFIXES = {"safetensors": "safetensors", "timm": "safetensors", "torch-export": "pt2"}


def out_file(folder: Path, file_format: str) -> Path:
    return folder / f"model.{SUFFIXES.get(file_format, file_format)}"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run's parameters in every format; tests only read it."""
    folder = tmp_path_factory.mktemp("exported")
    for file_format in FORMATS:
        result = export(run, "--out", out_file(folder, file_format), "--format", file_format)
        assert len(result.output.splitlines()) == 1, result.output
    assert set(os.listdir(folder)) == {out_file(folder, each).name for each in FORMATS}
    return folder


def check_computes(path: Path, file_format: str, model: nn.Module) -> None:
    compute = LOADERS[file_format](path)
    for num_images in BATCHES:
        images = torch.rand(num_images, 3, SIZE, SIZE) * 2 - 1
        with torch.no_grad():
            logits = model(images)
            torch.testing.assert_close(compute(images), logits, rtol=1e-4, atol=1e-4)
        assert logits.abs().max() > 0.1, "the comparison must have something to compare"


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_computes_what_the_checkpoint_does(run, exported, file_format):
    check_computes(out_file(exported, file_format), file_format, reference(run, "parameters"))


@pytest.mark.parametrize("file_format", ["safetensors", "torch-export"])
def test_the_ema_can_be_exported_instead(run, tmp_path, file_format):
    out = out_file(tmp_path, file_format)
    export(run, "--out", out, "--format", file_format, "--ema")
    check_computes(out, file_format, reference(run, "ema"))


def test_parameters_and_ema_differ(run):
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        logits = [reference(run, prefix)(images) for prefix in ("parameters", "ema")]
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_safetensors_is_the_default_and_holds_the_counters(run, tmp_path):
    out = tmp_path / "model.safetensors"
    export(run, "--out", out)
    state, expected = load_file(out), reference(run, "parameters").state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_file_says_what_model_it_is_of(exported):
    expected = {
        "model": "xception",
        "settings": SETTINGS,
        "num_classes": str(NUM_CLASSES),
        "image_size": str(SIZE),
    }
    with safe_open(exported / "model.safetensors", "pt") as file:
        found = file.metadata()
    assert found.pop("format") == "pt"
    assert found | {"settings": json.loads(found["settings"])} == expected
    extra = {"metadata.json": ""}
    torch.export.load(exported / "model.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"]) == found
    onnx = pytest.importorskip("onnx")
    properties = {p.key: p.value for p in onnx.load(exported / "model.onnx").metadata_props}
    assert properties.items() >= found.items()


def test_a_program_takes_each_tensor_along_alone(exported):
    """Tensors that still lay in one flat vector would each be saved with the whole of it."""
    for name, tensor in torch.export.load(exported / "model.pt2").state_dict.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_a_program_refuses_another_size(exported):
    program = torch.export.load(exported / "model.pt2").module()
    with pytest.raises(Exception, match=str(SIZE)):
        program(torch.zeros(1, 3, SIZE + 1, SIZE))


def test_timm_takes_only_the_default_structure(run, tmp_path):
    text = refusal(run, "--out", tmp_path / "model.safetensors", "--format", "timm")
    assert "model.width = 0.05" in text
    assert not os.listdir(tmp_path)


def test_timm_writes_the_default_structure_with_a_note(tmp_path):
    run = write_run(tmp_path / "full", {"name": "xception", "dropout": 0.5})
    out = tmp_path / "timm.safetensors"
    result = export(run, "--out", out, "--format", "timm")
    assert result.output.splitlines()[1:] == [NOTES["timm"]]
    with safe_open(out, "pt") as file:
        assert file.get_slice("fc.weight").get_shape() == [NUM_CLASSES, 2048]
        assert file.get_slice("block12.rep.4.conv1.weight").get_shape() == [728, 1, 3, 3]


def test_a_model_that_cannot_be_traced_gets_one_line(tmp_path):
    (tmp_path / "own.py").write_text(FACTORY)
    run = write_run(tmp_path / "own", {"factory": f"{tmp_path / 'own.py'}:Doubtful"})
    text = refusal(run, "--out", tmp_path / "model.pt2", "--format", "torch-export")
    assert "can't be traced" in text
    text = refusal(run, "--out", tmp_path / "model.safetensors", "--format", "timm")
    assert "xception" in text
    export(run, "--out", tmp_path / "model.safetensors")
    assert set(load_file(tmp_path / "model.safetensors")) == {"dense.weight", "dense.bias"}


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_way_to_get_it(run, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    text = refusal(run, "--out", tmp_path / "model.onnx", "--format", "onnx")
    assert f"needs {package}: pip install onnx onnxscript" in text
    assert not os.listdir(tmp_path)


def test_a_model_too_large_for_onnx_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_ONNX_LIMIT", 10_000)
    text = refusal(run, "--out", tmp_path / "model.onnx", "--format", "onnx")
    assert "choose another format" in text


@pytest.mark.parametrize("file_format", FORMATS)
def test_others_may_read_a_file_as_far_as_the_umask_lets_them(exported, tmp_path, file_format):
    (tmp_path / "plain").touch()
    mode = out_file(exported, file_format).stat().st_mode
    assert mode == (tmp_path / "plain").stat().st_mode


@pytest.fixture(scope="module")
def small_disk() -> Iterator[ProcessPoolExecutor]:
    """A process whose files can't grow beyond 4096 bytes; here the limit would hold for logs."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ProcessPoolExecutor(
        1,
        get_context("spawn"),
        initializer=resource.setrlimit,
        initargs=(resource.RLIMIT_FSIZE, (4096, most)),
    ) as process:
        yield process


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_full_disk_leaves_the_earlier_file_whole(small_disk, run, tmp_path, file_format):
    out = out_file(tmp_path, file_format)
    out.write_text("earlier")
    checkpoint = find_checkpoint(run, None)
    export = small_disk.submit(
        export_saved, run, checkpoint, out, ema=True, file_format=file_format
    )
    with pytest.raises(InputError, match=f"--out {out} can't be written: "):
        export.result()
    assert out.read_text() == "earlier"
    assert os.listdir(tmp_path) == [out.name]


def test_an_existing_file_is_replaced(run, tmp_path):
    out = tmp_path / "model.safetensors"
    out.write_text("earlier")
    with out.open() as reader:
        export(run, "--out", out)
        assert reader.read() == "earlier", "who has the old file open must not see it change"
    assert len(load_file(out)) > 1


@pytest.mark.parametrize("out", ["nowhere/model.safetensors", "file/model.safetensors", ".", "/"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=rf"^--out {out} "), replacing(Path(out)):
        pytest.fail("the block must not begin")
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_of_the_block_itself_passes_and_leaves_nothing(tmp_path):
    def half(path: Path) -> None:
        path.write_text("half")
        raise ZeroDivisionError

    out = tmp_path / "model"
    out.write_text("earlier")
    with pytest.raises(ZeroDivisionError), replacing(out) as incomplete:
        half(incomplete)
    assert out.read_text() == "earlier"
    assert os.listdir(tmp_path) == [out.name]


def test_tracing_switches_dropout_off():
    model = create_model("xception", NUM_CLASSES, **SETTINGS, dropout=0.9).train()
    program = trace(model, SIZE).module()
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(program(images), model.eval()(images))


def test_the_command_offers_every_format():
    (option,) = (p for p in cli.export.params if p.name == "file_format")
    assert tuple(option.type.choices) == get_args(Format)
