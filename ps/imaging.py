"""Between a shard's image, or an operation of its log, and protobuf messages."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from protos import parameter_server_pb2 as pb
from ps.gathering import SUM, GatheringImage, held_name
from ps.image import Image
from ps.lanes.headers import dtype_from, dtype_number
from ps.lanes.stream import StreamError
from ps.messages import (
    clocks_from,
    clocks_message,
    newest_pushes_from,
    newest_pushes_message,
    receipt_from,
    receipt_message,
)
from ps.operations import Enter, Expect, Fence, Operation
from ps.push import Order, Push
from ps.receipts import Outcome, WorkerRecord


def order_message(order: Order) -> pb.Order:
    return pb.Order(epoch=order.epoch, index=order.index)


def order_from(message: pb.Order) -> Order:
    return Order(message.epoch, message.index)


def operation_message(order: Order, operation: Operation) -> pb.Operation:
    """Of one that is not a push, which travels in a lane."""
    message = pb.Operation(order=order_message(order))
    match operation:
        case Fence():
            message.fence.worker = operation.worker
            message.fence.incarnation = operation.incarnation
        case Expect():
            message.expect.workers.extend(sorted(operation.workers))
            message.expect.number = operation.number
        case Enter():
            message.enter.worker = operation.worker
            message.enter.incarnation = operation.incarnation
            if operation.clock is not None:
                message.enter.clock = operation.clock
        case Push():
            raise AssertionError("a push has no message here")
    return message


def operation_from(message: pb.Operation) -> Operation:
    """Raises StreamError for one that is of no kind."""
    match message.WhichOneof("operation"):
        case "fence":
            return Fence(message.fence.worker, message.fence.incarnation)
        case "expect":
            return Expect(frozenset(message.expect.workers), message.expect.number)
        case "enter":
            clock = message.enter.clock if message.enter.HasField("clock") else None
            return Enter(message.enter.worker, message.enter.incarnation, clock)
    raise StreamError("an operation of no kind")


def image_header(order: Order, image: Image) -> pb.ImageHeader:
    """Describes an image, whose vectors follow in this header's order."""
    gathering = image.gathering
    return pb.ImageHeader(
        order=order_message(order),
        clocks=clocks_message(image.clocks),
        workers=[_worker_image(worker, record) for worker, record in image.records.items()],
        at_work=sorted(image.at_work),
        gathered=[
            pb.GatheredPush(
                worker=worker,
                incarnation=incarnation,
                sequence=sequence,
                held_num_samples=gathering.held.get(worker, 0),
            )
            for worker, (incarnation, sequence) in gathering.sequences.items()
        ],
        num_summed=gathering.num_summed,
        num_gathered_samples=gathering.num_samples,
        worker_clocks=image.worker_clocks,
        floor=image.floor,
        marked_clock=image.marked_clock,
        marked_version=image.marked_version,
        num_expected=image.num_expected,
        settled={outcome.value: count for outcome, count in image.settled.items()},
        vectors=[
            pb.ImageVector(name=name, numel=vector.numel(), dtype=dtype_number(vector.dtype))
            for name, vector in image.vectors.items()
        ],
        newest_pushes=newest_pushes_message(image.newest_pushes),
        marked_pushes=newest_pushes_message(image.marked_pushes),
    )


def _worker_image(worker: int, record: WorkerRecord) -> pb.WorkerImage:
    receipts = [
        pb.KeptReceipt(sequence=sequence, receipt=receipt_message(receipt))
        for sequence, receipt in record.receipts.items()
    ]
    return pb.WorkerImage(
        worker=worker,
        incarnation=record.incarnation,
        last_sequences=record.last_sequences,
        receipts=receipts,
    )


def room_for(header: pb.ImageHeader, numels: Mapping[str, int]) -> dict[str, Tensor]:
    """Memory for an image's vectors. numels: of the vectors of the shard's state.

    Raises StreamError for vectors that no such shard has.
    """
    sizes = {numels["parameters"], numels["statistics"]}
    given = {vector.name: vector.numel for vector in header.vectors}
    lacking = {name: numel for name, numel in numels.items() if given.get(name) != numel}
    strange = [name for name, numel in given.items() if name not in numels and numel not in sizes]
    most = len(numels) + 2 * (2 + len(header.gathered))  # marked, sum, and those that are held
    if lacking or strange or len(header.vectors) > most or len(given) < len(header.vectors):
        raise StreamError(f"vectors {sorted(given)} instead of {sorted(numels)}")
    return {v.name: torch.empty(v.numel, dtype=dtype_from(v.dtype)) for v in header.vectors}


def image_from(header: pb.ImageHeader, vectors: Mapping[str, Tensor]) -> Image:
    """Raises StreamError if vectors are missing, or something in it is of no kind."""
    gathered = {each.worker: (each.incarnation, each.sequence) for each in header.gathered}
    held = {each.worker: each.held_num_samples for each in header.gathered if each.held_num_samples}
    names = [*([SUM] if header.num_summed else []), *map(held_name, held)]
    pairs = [f"{name}.{part}" for name in names for part in ("gradient", "statistics_delta")]
    if not set(pairs) <= set(vectors):
        raise StreamError(f"vectors {sorted(set(pairs) - set(vectors))} are missing")
    gathering = GatheringImage(
        gathered,
        header.num_summed,
        header.num_gathered_samples,
        held,
        {name: vectors[name] for name in pairs},
    )
    return Image(
        clocks_from(header.clocks),
        {each.worker: _record_from(each) for each in header.workers},
        frozenset(header.at_work),
        _settled_from(header),
        gathering,
        vectors,
        dict(header.worker_clocks),
        header.floor,
        header.marked_clock,
        header.marked_version,
        header.num_expected,
        newest_pushes_from(header.newest_pushes),
        newest_pushes_from(header.marked_pushes),
    )


def _record_from(message: pb.WorkerImage) -> WorkerRecord:
    receipts = OrderedDict((kept.sequence, receipt_from(kept.receipt)) for kept in message.receipts)
    return WorkerRecord(message.incarnation, dict(message.last_sequences), receipts)


def _settled_from(header: pb.ImageHeader) -> dict[Outcome, int]:
    try:
        return {Outcome(name): count for name, count in header.settled.items()}
    except ValueError as error:
        raise StreamError(str(error)) from error
