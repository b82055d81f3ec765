"""Host memory for what is pulled and pushed, and the way between host and device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ps.lanes.segment import shared_zeros
from ps.layout import ShardRanges
from worker.gradient import GradientComputer

Wait = Callable[[], None]
"""Returns when a copy that was started has arrived."""


@dataclass(frozen=True)
class Mailbox:
    """What pushes are read from: flat vectors in host memory."""

    gradients: Tensor
    statistics_delta: Tensor


class HostVectors:
    """Host memory for what is pulled and pushed; on a CPU, the model's own vectors if they may be.

    Lanes read and write host memory. On a GPU each vector has a pinned twin there, and copies run
    on a stream of their own. On a CPU the gradients and deltas move to shared memory, so that a
    server on this host reads them where backpropagation leaves them.
    """

    def __init__(
        self,
        computer: GradientComputer,
        allocate: Callable[[int], Tensor] = shared_zeros,
        *,
        overlap: bool = False,
        twins: bool | None = None,
    ) -> None:
        """allocate: memory for so many float32 elements, which hold zeros.

        overlap: one gradient is pushed, and parameters are pulled, while another is computed: two
        mailboxes, and parameters apart from the model's.
        twins: whether nothing is the model's own; unless given, so it is on a GPU.
        """
        flat = self._flat = computer.flat
        self._computer = computer
        device = flat.gradients.device
        self._side = None if device.type == "cpu" else _stream(device)
        self._twins = device.type != "cpu" if twins is None else twins
        self.mailboxes = [self._mailbox(allocate) for _ in range(1 + overlap)]
        self._turn = 0
        self._place(self.mailboxes[0])
        apart = overlap or self._twins
        self.parameters = self._twin(flat.parameters) if apart else flat.parameters
        self.statistics = self._twin(flat.statistics) if apart else flat.statistics

    def _mailbox(self, allocate: Callable[[int], Tensor]) -> Mailbox:
        vectors = (self._flat.gradients, self._flat.statistics)
        if self._twins:
            return Mailbox(*(self._twin(vector) for vector in vectors))
        return Mailbox(*(allocate(vector.numel()) for vector in vectors))

    def _twin(self, vector: Tensor) -> Tensor:
        return torch.zeros(vector.shape, pin_memory=self._side is not None)  # zeros touch the pages

    def _place(self, mailbox: Mailbox) -> None:
        if not self._twins:
            self._flat.place_gradients(mailbox.gradients)
            self._computer.statistics_delta = mailbox.statistics_delta

    @property
    def mailbox(self) -> Mailbox:
        """Where the gradient goes that is being computed, or was computed last."""
        return self.mailboxes[self._turn]

    def turn(self) -> None:
        """Before a gradient is computed: to the mailbox that was filled longest ago."""
        if len(self.mailboxes) > 1:
            self._turn = 1 - self._turn
            self._place(self.mailbox)
        if self._side is not None:  # the device's gradient is about to be overwritten
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    def to_device(self) -> Wait:
        """After a pull: parameters and statistics to where the model is.

        The host's vectors must stay as they are until the copy has arrived.
        """
        flat = self._flat
        flat.parameters.copy_(self.parameters, non_blocking=True)
        flat.statistics.copy_(self.statistics, non_blocking=True)
        if self._side is None:
            return arrived
        return _wait_for(torch.cuda.current_stream(self._side.device))

    def to_host(self, ranges: ShardRanges) -> Wait:
        """One shard's part of gradients and deltas into the mailbox, behind what computes them."""
        if not self._twins:
            return arrived
        if self._side is None:
            self._copy_part(ranges)
            return arrived
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            self._copy_part(ranges)
        return _wait_for(self._side)

    def _copy_part(self, ranges: ShardRanges) -> None:
        parameters, statistics = ranges.parameters.slice(), ranges.statistics.slice()
        delta, mailbox = self._computer.statistics_delta, self.mailbox
        mailbox.gradients[parameters].copy_(self._flat.gradients[parameters], non_blocking=True)
        mailbox.statistics_delta[statistics].copy_(delta[statistics], non_blocking=True)


def arrived() -> None:
    """The `Wait` of memory that needs no copy, or that nothing is copied from."""


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _wait_for(stream: torch.cuda.Stream) -> Wait:
    """For all that the stream has been given so far."""
    event: torch.cuda.Event = stream.record_event()
    return lambda: event.synchronize()
