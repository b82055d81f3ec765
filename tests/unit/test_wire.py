"""Rounding to bf16 on the way, and error feedback: what is rounded off is sent later, once."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ps import wire as wire_module
from ps.lanes import stream
from ps.lanes.lane import LaneError
from ps.lanes.segment import map_vector, segment_of, shared_zeros
from ps.lanes.stream import copy_rounded, fill, narrowed_chunks, new_block
from ps.push import Push
from ps.shard import Outcome, Receipt
from ps.wire import PushCast, WireSettings

FEEDBACK = WireSettings(push="bfloat16", error_feedback=True)
NUMEL = 50


def nearest_bf16(vector):
    """Round to nearest, ties to even, on the bits; for numbers that are finite as bf16, too."""
    bits = vector.numpy().view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def any_numbers(numel, seed):
    """Finite float32 of every magnitude, denormals and exact ties among them."""
    bits = torch.randint(-(2**31), 2**31, (numel,), generator=torch.Generator().manual_seed(seed))
    bits = torch.where(torch.arange(numel) % 5 == 0, (bits & ~0xFFFF) | 0x8000, bits)
    vector = bits.to(torch.int32).view(torch.float32)
    return torch.where(vector.abs() < 3e38, vector, 1.0)


def push_of(gradient, sequence=0, incarnation=0):
    return Push(3, incarnation, sequence, 0, 2, gradient, torch.zeros(4))


def receipt(outcome=Outcome.APPLIED):
    return Receipt(outcome, 0, 0, 1.0)


class Sent(list):
    """Keeps what would have gone out, and answers as told."""

    outcome = Outcome.APPLIED

    def __call__(self, push):
        self.append(replace(push, gradient=push.gradient.clone()))
        return receipt(self.outcome)


# Settings


def test_error_feedback_needs_something_that_is_rounded():
    with pytest.raises(ValidationError, match=r"error_feedback = true .*push.*bfloat16.* false"):
        WireSettings(error_feedback=True)
    with pytest.raises(ValidationError):
        WireSettings(push="float16")
    assert WireSettings() == WireSettings(pull="float32", push="float32", error_feedback=False)


# Rounding


@given(numel=st.integers(0, 200), seed=st.integers(0, 99), block=st.integers(1, 90))
@settings(deadline=None)
def test_rounding_is_to_nearest_in_any_blocks(numel, seed, block):
    vector, arrived, rounded = any_numbers(numel, seed), torch.ones(numel), torch.ones(numel)
    with patch.object(stream, "BLOCK_NUMEL", block):
        messages = list(narrowed_chunks(vector))
        copy_rounded(rounded, vector, new_block())
    assert all(type(message) is bytes and len(message) <= 2 * block for message in messages)
    narrow = torch.zeros(numel, dtype=torch.bfloat16)
    fill([narrow], messages)
    arrived.copy_(narrow)
    assert torch.equal(arrived, nearest_bf16(vector))
    assert torch.equal(rounded, arrived)


def test_vectors_longer_than_a_block_keep_their_order():
    vector = torch.arange(stream.BLOCK_NUMEL + 3, dtype=torch.float32)
    assert [len(m) for m in narrowed_chunks(vector)] == [stream.CHUNK_NUM_BYTES, 6]
    rounded = torch.zeros_like(vector)
    copy_rounded(rounded, vector, new_block())
    assert torch.equal(rounded, nearest_bf16(vector))


# Memory of 2 bytes an element


def test_vectors_of_bf16_can_be_mapped():
    vector = shared_zeros(5000, torch.bfloat16)
    segment = segment_of(vector)
    vector.copy_(torch.randn(5000))
    assert torch.equal(map_vector(segment.fd, 2 * 3001, 1999, vector.dtype), vector[3001:])
    room = segment.size() // 2
    for offset, numel in ((1, 5), (0, room + 1), (2, room), (-2, 1)):
        with pytest.raises(LaneError):
            map_vector(segment.fd, offset, numel, vector.dtype)


# Pushes


def test_a_gradient_as_it_is_is_not_copied():
    sent, gradient = Sent(), torch.ones(NUMEL)
    push = push_of(gradient)
    assert PushCast(WireSettings()).send(push, lambda each: sent(each) and each) is push


def test_a_rounded_gradient_lies_in_shared_memory_and_always_at_the_same_place():
    cast, places = PushCast(WireSettings(push="bfloat16")), set()

    def look(push):
        assert segment_of(push.gradient) is not None
        places.add(push.gradient.data_ptr())
        assert torch.equal(push.gradient.float(), nearest_bf16(gradient))
        return receipt()

    for sequence in range(3):
        gradient = any_numbers(NUMEL, sequence)
        kept = gradient.clone()
        cast.send(push_of(gradient, sequence), look)
        assert torch.equal(gradient, kept)
    assert len(places) == 1


gradients = st.tuples(
    st.sampled_from(["any", "small", "nan", "inf", "overflows"]), st.integers(0, 99)
)
steps = st.lists(
    st.tuples(gradients, st.sampled_from(list(Outcome)), st.integers(0, 2), st.integers(0, 2)),
    max_size=8,
)


def gradient_of(kind, seed):
    if kind == "any":
        return any_numbers(NUMEL, seed) / 1e4  # sums of a few don't overflow
    gradient = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))
    special = {"nan": torch.nan, "inf": torch.inf, "overflows": 3.4e38}
    if kind in special:
        gradient[seed % NUMEL] = special[kind]
    return gradient


@given(steps=steps, block=st.sampled_from([7, 25, 1 << 19]))
@settings(deadline=None, max_examples=60)
def test_what_is_owed_is_what_taken_pushes_lacked(steps, block):
    """Whatever fails, is dropped, or is sent again; exactly, and NaN and Inf are never owed."""
    owed = torch.zeros(NUMEL)
    with patch.object(wire_module, "BLOCK_NUMEL", block):
        cast = PushCast(FEEDBACK)
        for sequence, (kind, outcome, num_failures, num_repeats) in enumerate(steps):
            gradient, sent = gradient_of(*kind), Sent()
            push = push_of(gradient, sequence)
            total = gradient + owed
            rounded = total.to(torch.bfloat16)
            is_finite = bool(torch.isfinite(rounded).all())
            sent.outcome = outcome if is_finite else Outcome.NOT_FINITE

            def fail(push, sent=sent):
                sent(push)
                raise ConnectionError

            for _ in range(num_failures):
                with pytest.raises(ConnectionError):
                    cast.send(push, fail)
            cast.send(push, sent)
            for each in sent:
                assert each.gradient.dtype == torch.bfloat16
                torch.testing.assert_close(each.gradient, rounded, rtol=0, atol=0, equal_nan=True)
            if sent.outcome in (Outcome.APPLIED, Outcome.ACCUMULATED):
                owed = total - rounded.float()
                # Nothing is lost: float64 holds the sum of the two without rounding here.
                assert torch.equal(rounded.double() + owed.double(), total.double())
            for _ in range(num_repeats):
                cast.send(push, sent)
            assert torch.equal(cast.residual(), owed)
            assert torch.isfinite(owed).all()


def test_the_sum_of_what_is_sent_is_that_of_the_gradients_but_for_what_is_owed():
    """To float32's rounding, where without feedback bf16's rounding adds up."""
    cast, sent, plain = PushCast(FEEDBACK), Sent(), 0.0
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.rand(NUMEL, generator=generator) * 1e-3 + 1.0 for _ in range(400)]
    for sequence, gradient in enumerate(gradients):
        cast.send(push_of(gradient, sequence), sent)
        plain = plain + nearest_bf16(gradient).double()
    exact = sum(gradient.double() for gradient in gradients)
    arrived = sum(push.gradient.double() for push in sent)
    float32_rounding = len(gradients) * 2.0**-24 * 2
    assert (arrived + cast.residual().double() - exact).abs().max() <= float32_rounding
    assert (arrived - exact).abs().max() < 0.01
    assert (plain - exact).abs().max() > 0.1


def test_a_later_life_is_owed_what_is_left_but_none_of_its_pushes_is_a_repetition():
    cast, sent, gradient = PushCast(FEEDBACK), Sent(), torch.full((NUMEL,), 1 + 2.0**-10)
    cast.send(push_of(gradient, 5), sent)
    assert (cast.residual() == 2.0**-10).all()
    cast.send(push_of(gradient, 4), sent)
    assert (cast.residual() == 2.0**-10).all()
    cast.send(push_of(gradient, 0, incarnation=1), sent)
    assert (cast.residual() == 2.0**-9).all()


def test_a_shard_without_parameters_gets_its_pushes():
    sent = Sent()
    PushCast(FEEDBACK).send(push_of(torch.zeros(0)), sent)
    assert sent[0].gradient.numel() == 0
