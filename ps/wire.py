"""In which numbers parameters and gradients travel, and what becomes of what rounding cuts off."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from model.settings import Settings
from ps.lanes.segment import shared_zeros
from ps.lanes.stream import BLOCK_NUMEL
from ps.push import Push
from ps.receipts import Outcome, Receipt

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_TAKEN = (Outcome.APPLIED, Outcome.ACCUMULATED)
"""Outcomes after which what was sent is in the parameters, or will be."""


class WireSettings(Settings):
    """Numbers of 4 bytes or of 2 on the way between workers and servers, for slow networks.

    Servers keep and update float32 whatever travels, and BN statistics travel as float32. Between
    processes of one host little or nothing is gained.
    """

    pull: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: workers compute from parameters rounded to 8 bits of mantissa."""
    push: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: gradients are rounded to 8 bits of mantissa, each by half a unit of the last one at
    most."""
    error_feedback: bool = False
    """Add what rounding cut off a worker's gradient to its next one, so that nothing is lost
    (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847). Takes two more float32 vectors of
    the parameters' size in each worker. For push = "bfloat16"."""

    @model_validator(mode="after")
    def _feeds_back_what_is_rounded(self) -> Self:
        if self.error_feedback and self.push == "float32":
            raise ValueError(
                'wire.error_feedback = true with wire.push = "float32", which rounds nothing, would'
                ' cost memory to no effect: set wire.push to "bfloat16", or wire.error_feedback to'
                " false"
            )
        return self

    @property
    def pull_dtype(self) -> torch.dtype:
        """What parameters travel in."""
        return _DTYPES[self.pull]

    @property
    def push_dtype(self) -> torch.dtype:
        """What gradients travel in."""
        return _DTYPES[self.push]


AS_IS = WireSettings()


class PushCast:
    """Casts what one worker pushes to one shard, once for each push, however often it is sent.

    With error feedback, of gradient g and residual r the shard gets q = bf16(g + r), and r becomes
    (g + r) - q, exactly. It does so only once the shard has taken the push: of a push that it drops
    (stale, not finite, fenced) g is lost, as the receipt says, and r is owed as before. So no NaN
    gets into r, and the same push, sent again, is the same bytes.
    """

    def __init__(self, settings: WireSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._sent = torch.zeros(0, dtype=settings.push_dtype)
        self._residual = self._next_residual = self._widened = torch.zeros(0)
        self._taken: tuple[int, int, int] | None = None

    def send(self, push: Push, send: Callable[[Push], Receipt]) -> Receipt:
        """The receipt that `send` gets for the push as it travels, which lies in shared memory.

        Pushes that are cast queue.
        """
        if self._settings.push_dtype == torch.float32:
            return send(push)
        with self._lock:
            self._make_room(push.gradient.numel())
            if self._settings.error_feedback:
                self._round_with_residual(push.gradient)
            else:
                self._sent.copy_(push.gradient)
            receipt = send(replace(push, gradient=self._sent))
            if self._settings.error_feedback:
                self._note(push, receipt)
            return receipt

    def residual(self) -> Tensor:
        """What the shard is owed: a copy, float32; empty before the first push."""
        with self._lock:
            return self._residual.clone()

    def _make_room(self, numel: int) -> None:
        if self._sent.numel() == numel:
            return
        self._sent = shared_zeros(numel, self._settings.push_dtype)
        if self._settings.error_feedback:
            self._residual, self._next_residual = torch.zeros(numel), torch.zeros(numel)
            self._widened = torch.zeros(min(BLOCK_NUMEL, numel))

    def _round_with_residual(self, gradient: Tensor) -> None:
        vectors = (gradient, self._residual, self._next_residual, self._sent)
        # By blocks, which stay in cache; torch is slow at subtracting two dtypes.
        for parts in zip(*(torch.split(vector, BLOCK_NUMEL) for vector in vectors), strict=True):
            g, r, r_next, q = parts
            q.copy_(torch.add(g, r, out=r_next))
            r_next.sub_(self._widened[: q.numel()].copy_(q))

    def _note(self, push: Push, receipt: Receipt) -> None:
        if receipt.outcome not in _TAKEN or self._is_repeated(push):
            return
        self._taken = (push.worker, push.incarnation, push.sequence)
        self._residual, self._next_residual = self._next_residual, self._residual

    def _is_repeated(self, push: Push) -> bool:
        """Whether the shard had taken the push before: it gets the first receipt, and adds nothing.

        A worker's pushes are sent in the order of their sequences.
        """
        life = (push.worker, push.incarnation)
        return (
            self._taken is not None and life == self._taken[:2] and push.sequence <= self._taken[2]
        )
