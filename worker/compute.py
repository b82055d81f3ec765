"""How a network is computed: memory format, precision and compilation, on any device."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.errors import InputError
from model.flat import FlatModule
from model.settings import Settings
from worker.data.transform import normalize


class ComputeSettings(Settings):
    """None of these changes what is pulled, pushed or stored, which is float32 throughout."""

    channels_last: bool = True
    """Feature maps with the channels of a pixel side by side (NHWC), which CPU kernels prefer.
    Images and maps only; parameters keep their places in the flat vectors."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: training's forward and backward pass under autocast, for processors with bf16
    instructions (AVX512-BF16, AMX, GPUs since Ampere). Parameters, gradients, batch norm
    statistics, the loss and evaluations stay float32."""

    compile: bool = False
    """torch.compile for the network: a minute or more of compilation in each process, and again
    for a second batch size. Meant for GPUs, where it needs Triton; on a CPU it needs a C++
    compiler and was slower (docs/step.md)."""

    @property
    def for_evaluation(self) -> "ComputeSettings":
        """The same in float32: rounded to bf16's 8 bits, the scores of many classes tie."""
        return self.model_copy(update={"precision": "float32"})


class ForwardPass:
    """uint8 images (N, 3, H, W) on the host to float32 logits (N, num_classes) on the device.

    The module's mode says whether it is a pass of training. Backward adds into the flat
    gradients, compiled or not. The callable that `torch.compile` gives shares the module's
    tensors, so what is pulled into the flat vectors reaches it without a new compilation.

    network: what wraps the module, such as DDP; the module itself unless given.
    Raises InputError, in the first pass, where `compile` finds no compiler.
    """

    def __init__(
        self, flat: FlatModule, settings: ComputeSettings, network: nn.Module | None = None
    ) -> None:
        self._device = flat.parameters.device
        self._format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self._autocast = settings.precision == "bfloat16"
        network = network or flat.module
        self._network = _compiled(network) if settings.compile else network

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self._device, non_blocking=True)
        # A reorder of bytes, a quarter of what it would be after the conversion to float32.
        pixels = normalize(images.contiguous(memory_format=self._format))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            logits: Tensor = self._network(pixels)
        return logits.float()


def _compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    from torch._dynamo.exc import TorchDynamoException  # a second to import, for this alone

    # Dropout then draws the masks that it draws without compilation.
    options: dict[str, Any] = {"fallback_random": True}
    network: Callable[[Tensor], Tensor] = torch.compile(module, options=options)

    def forward(images: Tensor) -> Tensor:
        try:
            return network(images)
        except TorchDynamoException as error:
            missing = _without_compiler(error)
            if missing is None:
                raise
            raise missing from None

    return forward


_COMPILER_ERRORS = {
    "InvalidCxxCompiler": "install g++ or clang (or name one in CXX)",
    "CppCompileError": "mend the C++ compiler (or name another in CXX)",
    "TritonMissing": "install triton",
    "GPUTooOldForTriton": "use a newer GPU",
}
"""What torch raises for want of a compiler, by class name (they move between versions)."""


def _without_compiler(error: BaseException) -> InputError | None:
    """An error about the missing compiler, or None if that was not the cause."""
    cause: Any = getattr(error, "inner_exception", error)
    mend = _COMPILER_ERRORS.get(type(cause).__name__)
    if mend is None:
        return None
    said = " ".join(str(cause).split())[:120]
    return InputError(
        f"compute.compile = true, but torch can't compile here ({said}): {mend} wherever workers"
        " and the evaluator run, or set compute.compile to false"
    )
