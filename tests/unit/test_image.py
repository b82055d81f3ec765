"""A shard made of an image goes on exactly as the one that the image is of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from log_operations import POLICIES, config_of, facts, first_state_of, operations, own, sent

from ps.consistency import Sync
from ps.imaging import image_from, image_header, operation_from, operation_message, room_for
from ps.lanes.stream import StreamError
from ps.operations import Enter, Expect, Fence, has_effect, perform
from ps.push import Order, Push
from ps.receipts import ForgottenReceipt
from ps.shard import Shard


def outcome(shard, operation):
    try:
        return perform(shard, own(operation))
    except ForgottenReceipt:
        return "forgotten"


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@given(before=st.lists(operations, max_size=15), after=st.lists(operations, max_size=15))
def test_a_shard_of_an_image_goes_on_as_the_first_one(policy, before, after):
    config = config_of(policy)
    shard = Shard(config, first_state_of(config))
    for operation in before:
        outcome(shard, operation)
    other = Shard.of_image(config, sent(config, shard.image()))
    assert facts(other.image()) == facts(shard.image())
    for operation in after:
        assert outcome(other, operation) == outcome(shard, operation)
        assert other.checksum() == shard.checksum()
    assert facts(other.image()) == facts(shard.image())
    mine, its = shard.pin(0), other.pin(0)
    assert mine.version == its.version
    assert torch.equal(mine.parameters, its.parameters)


@given(operations=st.lists(operations, max_size=25))
def test_what_has_no_effect_changes_nothing(operations):
    config = config_of(POLICIES[0])
    shard = Shard(config, first_state_of(config))
    for operation in operations:
        if has_effect(shard, operation):
            outcome(shard, operation)
            continue
        before = shard.checksum(), shard.last_sequences(), shard.num_expected
        outcome(shard, operation)
        assert before == (shard.checksum(), shard.last_sequences(), shard.num_expected)


def test_pushes_that_wait_for_their_turn_are_in_an_image():
    config = config_of(Sync(deterministic=True))
    shard = Shard(config, first_state_of(config))

    def push(worker):
        vectors = (torch.full((24,), 0.1 * (worker + 1)), torch.ones(8))
        return Push(worker, 0, 0, 0, worker + 1, *vectors)

    shard.push(push(2))
    shard.push(push(0))
    other = Shard.of_image(config, sent(config, shard.image()))
    assert shard.push(push(1)) == other.push(push(1))
    assert (shard.version, other.version) == (1, 1)
    assert facts(shard.image()) == facts(other.image())


def test_an_image_is_a_copy():
    config = config_of(POLICIES[0])
    shard = Shard(config, first_state_of(config))
    image = shard.image()
    first = facts(image)
    shard.fence(1, 3)
    for vector in shard._vectors().values():
        vector.fill_(7.0)
    assert facts(image) == first


@pytest.mark.parametrize(
    "operation",
    [
        Fence(1, 2),
        Expect(frozenset({0, 2}), 4),
        Expect(frozenset(), 1),
        Enter(1, 2),
        Enter(1, 2, 0),
    ],
)
def test_operations_arrive_as_they_were_sent(operation):
    message = operation_message(Order(3, 4), operation)
    assert operation_from(message) == operation
    assert (message.order.epoch, message.order.index) == (3, 4)


def an_image_header():
    config = config_of(POLICIES[0])
    image = Shard(config, first_state_of(config)).image()
    return config, image_header(Order(1, 0), image)


@pytest.mark.parametrize(
    "damage",
    [
        lambda header: header.vectors.pop(),
        lambda header: header.vectors.add(name="parameters", numel=24),
        lambda header: header.vectors.add(name="large", numel=1 << 40),
        lambda header: [header.vectors.add(name=str(n), numel=24) for n in range(9)],
        lambda header: setattr(header.vectors[0], "numel", 23),
        lambda header: setattr(header.vectors[0], "dtype", 9),
    ],
)
def test_an_image_of_another_shape_is_refused(damage):
    config, header = an_image_header()
    damage(header)
    with pytest.raises(StreamError):
        room_for(header, config.vector_numels())


def test_an_image_whose_parts_are_missing_is_refused():
    config, header = an_image_header()
    vectors = room_for(header, config.vector_numels())
    header.num_summed = 1
    with pytest.raises(StreamError, match=r"sum\.gradient"):
        image_from(header, vectors)
