"""What travels ahead of vectors."""

import grpc
import torch
from torch import Tensor

from protos import parameter_server_pb2 as pb
from ps.lanes.lane import Refused, Wanted
from ps.lanes.stream import StreamError
from ps.messages import newest_pushes_from, newest_pushes_message
from ps.push import Order, Push
from ps.snapshot import Pulled, Snapshot

_NUMBERS = {torch.float32: pb.FLOAT32, torch.bfloat16: pb.BFLOAT16}
_DTYPES: dict[int, torch.dtype] = {number: dtype for dtype, number in _NUMBERS.items()}


def dtype_number(dtype: torch.dtype) -> pb.DType:
    """How messages call it."""
    return _NUMBERS[dtype]


def dtype_from(number: int) -> torch.dtype:
    """What elements travel in. Raises StreamError for a number that stands for nothing."""
    if number not in _DTYPES:
        raise StreamError(f"no elements of dtype {number}")
    return _DTYPES[number]


def pull_request(wanted: Wanted) -> pb.PullRequest:
    """What a pull asks for."""
    return pb.PullRequest(
        at_least=wanted.at_least,
        wait_s=wanted.wait_s,
        worker=wanted.worker,
        dtype=_NUMBERS[wanted.dtype],
    )


def asker(request: pb.PullRequest) -> int | None:
    """The worker that pulls, if one does."""
    return request.worker if request.HasField("worker") else None


def pull_header(snapshot: Snapshot, dtype: torch.dtype, worker: int | None) -> pb.PullHeader:
    """All of a version but its vectors. dtype: what its parameters travel in."""
    is_told = worker is not None
    return pb.PullHeader(
        version=snapshot.version,
        num_parameters=snapshot.parameters.numel(),
        num_statistics=snapshot.statistics.numel(),
        dtype=_NUMBERS[dtype],
        newest_pushes=newest_pushes_message(snapshot.newest_pushes) if is_told else None,
    )


def pulled_from(header: pb.PullHeader) -> Pulled:
    """Which version it is the header of. Raises StreamError."""
    return Pulled(header.version, newest_pushes_from(header.newest_pushes))


def check_dtype(header: pb.PullHeader, expected: torch.dtype) -> None:
    """Raises StreamError if parameters arrive in another dtype than was asked for."""
    given = dtype_from(header.dtype)
    if given != expected:
        raise StreamError(f"parameters in {given} instead of {expected}")


def push_header(push: Push) -> pb.PushHeader:
    """All of a push but its vectors, whose lengths and dtype are there.

    Raises Refused for vectors that can't travel, before anything is sent.
    """
    dtypes = (push.gradient.dtype, push.statistics_delta.dtype)
    if dtypes[0] not in _NUMBERS or dtypes[1] != torch.float32:
        reason = f"a gradient of {dtypes[0]} and deltas of {dtypes[1]}"
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, reason)
    order = push.order
    return pb.PushHeader(
        worker=push.worker,
        incarnation=push.incarnation,
        sequence=push.sequence,
        pulled_version=push.pulled_version,
        num_samples=push.num_samples,
        num_parameters=push.gradient.numel(),
        num_statistics=push.statistics_delta.numel(),
        dtype=_NUMBERS[dtypes[0]],
        order=pb.Order(epoch=order.epoch, index=order.index) if order else None,
    )


def lengths_of(header: pb.PushHeader) -> tuple[int, int]:
    """Elements of the vectors that follow; zeros if the header doesn't say."""
    return header.num_parameters, header.num_statistics


def check_push_header(header: pb.PushHeader) -> None:
    """Raises StreamError for a push that can't be meant."""
    if header.sequence < 0 or header.num_samples <= 0:
        raise StreamError(f"push {header.sequence} of {header.num_samples} samples")


def push_from(header: pb.PushHeader, gradient: Tensor, statistics_delta: Tensor) -> Push:
    """The push of a header and its vectors. Raises StreamError as `check_push_header`."""
    check_push_header(header)
    return Push(
        header.worker,
        header.incarnation,
        header.sequence,
        header.pulled_version,
        header.num_samples,
        gradient,
        statistics_delta,
        Order(header.order.epoch, header.order.index) if header.HasField("order") else None,
    )
