"""A run's model in files for other programs: safetensors, timm's names, torch.export, ONNX."""

import importlib.util
import io
import json
import logging
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from asynception.building import build_flat
from asynception.config_inputs import ModelConfig
from asynception.saved import load_saved
from model.errors import InputError
from model.registry import check_settings
from model.timm_names import TIMM_NOTE, timm_tensors
from ps.checkpoint_store import Saved
from worker.evaluator import load_state

Format = Literal["safetensors", "timm", "torch-export", "onnx"]

NOTES: Mapping[Format, str] = {"timm": TIMM_NOTE}
"""What the user of a file of this format should know."""

_ONNX_PACKAGES = ("onnx", "onnxscript")
_ONNX_LIMIT = 2**31 - 1
"""Bytes of one protobuf message, which an ONNX file is."""
_BATCH = Dim("batch", min=1)
_EXAMPLE_IMAGES = 2
"""Not 1: torch.export takes a batch of one for a constant."""


def export_saved(run: Path, path: Saved, out: Path, *, ema: bool, file_format: Format) -> None:
    """Write a checkpoint's model to `out`, which is replaced only by a whole file.

    ema: the averaged parameters and BN statistics instead of the present ones. BN's counters are
    those of a new model. Raises InputError.
    """
    config, num_classes, checkpoint = load_saved(run, path)
    flat = build_flat(config, num_classes)
    load_state(flat, checkpoint.state, ema=ema)
    module = _with_own_memory(flat.module)
    size = config.data.image_size
    metadata = describe_model(config.model.title, config.model.settings, num_classes)
    metadata |= {"image_size": str(size)}
    with replacing(out) as incomplete:
        match file_format:
            case "safetensors":
                save_state(module.state_dict(), incomplete, metadata)
            case "timm":
                save_state(_timm_state(module, config.model), incomplete, metadata)
            case "torch-export":
                _save_program(trace(module, size), incomplete, metadata)
            case "onnx":
                _save_onnx(module, size, incomplete, metadata)


def describe_model(name: str, settings: Mapping[str, object], num_classes: int) -> dict[str, str]:
    """What an exported file says of its model: `create_model`'s arguments."""
    return {"model": name, "settings": json.dumps(settings), "num_classes": str(num_classes)}


def save_state(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a state dict as safetensors; tied tensors become copies.

    Raises OSError or SafetensorError, which is safetensors' own error for a full disk as well.
    """
    layout = torch.contiguous_format
    tensors = {name: tensor.clone(memory_format=layout) for name, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "pt", **metadata})


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A file beside `out` to write to, which takes its place at the end of the block.

    After an error it is gone, and `out` as it was. Raises InputError if `out` can't be written,
    at once if its folder is missing or not writable.
    """
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: name a file in it")
    incomplete = out.with_name(f".incomplete-{out.name}")
    try:
        incomplete.touch()
        mode = incomplete.stat().st_mode
        yield incomplete
        incomplete.chmod(stat.S_IMODE(mode))  # safetensors makes its files private
        os.replace(incomplete, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--out {out} can't be written: {reason}: name a file in a folder that exists, can be"
            " written and has room"
        ) from None
    finally:
        if incomplete.exists():
            incomplete.unlink()


def trace(module: nn.Module, image_size: int) -> ExportedProgram:
    """The module in eval mode as a program for any number of images of one size.

    It takes float32 (N, 3, image_size, image_size) images in [-1, 1], as
    `worker.data.transform.normalize` gives them, and returns (N, num_classes) logits.

    Raises InputError for a module that torch.export can't trace, as a user's own may be.
    """
    images = torch.zeros(_EXAMPLE_IMAGES, 3, image_size, image_size)
    try:
        with _quiet_torch():
            return torch.export.export(module.eval(), (images,), dynamic_shapes=({0: _BATCH},))
    except RuntimeError as error:  # the base of all that torch.export raises for untraceable code
        raise InputError(
            f"the model can't be traced by torch.export ({_first_line(error)}): choose --format"
            " safetensors, or rewrite what it names"
        ) from None


def _with_own_memory(module: nn.Module) -> nn.Module:
    """The module without gradients, out of the flat vectors: a tensor is saved with its storage."""
    for parameter in module.parameters():
        parameter.grad = None
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    return module


def _timm_state(module: nn.Module, model: ModelConfig) -> dict[str, Tensor]:
    if model.factory is not None or model.name != "xception":
        raise InputError(
            f"--format timm is for model.name = 'xception', and the run's model is {model.title}:"
            " choose another format"
        )
    return timm_tensors(module.state_dict(), check_settings(model.name, model.settings))


def _save_program(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    # By way of memory: torch's own writer aborts the process when the disk is full.
    content = io.BytesIO()
    extra_files = {"metadata.json": json.dumps(metadata)}
    torch.export.save(program, content, extra_files=extra_files)
    path.write_bytes(content.getbuffer())


def _save_onnx(module: nn.Module, image_size: int, path: Path, metadata: Mapping[str, str]) -> None:
    """With weights inside, inputs "images" and outputs "logits"."""
    _check_onnx(module)
    program = trace(module, image_size)
    try:
        with _quiet_torch():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: _BATCH},),
            )
    except RuntimeError as error:  # the base of torch.onnx's errors
        raise InputError(
            f"the model can't be converted to ONNX ({_first_line(error)}): choose another --format"
        ) from None
    assert converted is not None
    converted.model.metadata_props.update(metadata)
    converted.save(path)


def _check_onnx(module: nn.Module) -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--format onnx needs {' and '.join(missing)}: pip install {' '.join(_ONNX_PACKAGES)}"
        )
    num_bytes = sum(tensor.nbytes for tensor in module.state_dict().values())
    if num_bytes > _ONNX_LIMIT:
        raise InputError(
            f"--format onnx: the model has {num_bytes / 1e9:.1f} GB, and an ONNX file holds 2.1:"
            " choose another format"
        )


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Without what torch's exporters say besides raising their errors.

    They print graphs that they could not trace, warn that torchvision is absent, and warn of
    their own use of what is deprecated.
    """
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
