"""What travels ahead of a push's vectors."""

from torch import Tensor

from protos import parameter_server_pb2 as pb
from ps.lanes.stream import StreamError
from ps.push import Push


def push_header(push: Push) -> pb.PushHeader:
    """All of a push but its vectors, whose lengths are there."""
    return pb.PushHeader(
        worker=push.worker,
        incarnation=push.incarnation,
        sequence=push.sequence,
        pulled_version=push.pulled_version,
        num_samples=push.num_samples,
        num_parameters=push.gradient.numel(),
        num_statistics=push.statistics_delta.numel(),
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
    )
