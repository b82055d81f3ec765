"""Random operations of a shard's log, and shards that carry them out."""

import torch
from hypothesis import strategies as st

from protos import parameter_server_pb2 as pb
from ps.consistency import Async, Averaging, Bounded, Sync
from ps.imaging import image_from, image_header, room_for
from ps.lanes.stream import chunks, fill
from ps.layout import Range, ShardRanges
from ps.operations import Enter, Expect, Fence
from ps.push import Order, Push
from ps.receipts import Outcome
from ps.rules import Ema, Momentum
from ps.schedule import Exponential, Horizon
from ps.shard import ShardConfig, initial_state

NUM_PARAMETERS, NUM_STATISTICS, NUM_WORKERS = 24, 8, 3

POLICIES = [
    Async(),
    Async(max_staleness=1),
    Bounded(slack=0),
    Bounded(slack=2),
    Sync(),
    Sync(backup_workers=1),
    Sync(deterministic=True),
    Averaging(local_steps=2),
]


def config_of(policy):
    ranges = ShardRanges(Range(0, NUM_PARAMETERS), Range(0, NUM_STATISTICS), (Range(4, 20),))
    return ShardConfig(
        ranges,
        policy.server_rule(Momentum(weight_decay=0.01), NUM_WORKERS),
        Exponential(lr=0.5, decay=0.9, every=2, unit="updates"),
        Horizon(epoch_samples=50, num_workers=NUM_WORKERS),
        Ema(decay=0.9),
        policy,
    )


def first_state_of(config):
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(NUM_PARAMETERS, generator=generator)
    return initial_state(config.rule, parameters, torch.zeros(NUM_STATISTICS))


@st.composite
def push_of(draw):
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(NUM_PARAMETERS, generator=generator)
    if draw(st.integers(0, 9)) == 0:
        gradient[3] = float("nan")
    if draw(st.booleans()):
        gradient = gradient.bfloat16()
    return Push(
        draw(st.integers(0, NUM_WORKERS - 1)),
        draw(st.integers(0, 2)),
        draw(st.integers(0, 6)),
        draw(st.integers(0, 6)),
        draw(st.integers(1, 4)),
        gradient,
        torch.randn(NUM_STATISTICS, generator=generator),
    )


workers = st.integers(0, NUM_WORKERS - 1)
fences = st.builds(Fence, workers, st.integers(0, 3))
expectations = st.builds(Expect, st.frozensets(workers), st.integers(1, 8))
entries = st.builds(Enter, workers, st.integers(0, 3), st.none() | st.integers(0, 4))
operations = st.one_of(push_of(), push_of(), push_of(), push_of(), fences, expectations, entries)


def own(operation):
    """A copy: a shard uses a push's vectors up."""
    if not isinstance(operation, Push):
        return operation
    vectors = (operation.gradient.clone(), operation.statistics_delta.clone())
    return Push(
        *[getattr(operation, name) for name in list(Push.__dataclass_fields__)[:5]], *vectors
    )


def sent(config, image):
    """An image as it arrives elsewhere."""
    header = pb.ImageHeader.FromString(image_header(Order(1, 0), image).SerializeToString())
    vectors = room_for(header, config.vector_numels())
    fill(list(vectors.values()), chunks(list(image.vectors.values())))
    return image_from(header, vectors)


def facts(image):
    """All of an image that two shards that are the same have in common.

    How often pushes were refused from lives that are over is each one's own count.
    """
    vectors = {name: vector.float().tolist() for name, vector in image.vectors.items()}
    gathering = image.gathering
    return repr(
        (
            image.clocks,
            sorted(image.records.items()),
            sorted(image.at_work),
            sorted((o.value, n) for o, n in image.settled.items() if n and o is not Outcome.FENCED),
            sorted(gathering.sequences.items()),
            gathering.num_summed,
            gathering.num_samples,
            sorted(gathering.held.items()),
            sorted(image.worker_clocks.items()),
            (image.floor, image.marked_clock, image.marked_version, image.num_expected),
            sorted(vectors.items()),
        )
    )
