"""Vectors as streams of messages: every byte arrives, in any cut, or StreamError."""

from itertools import chain, pairwise, repeat
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.lanes import stream
from ps.lanes.stream import CHUNK_NUM_BYTES, StreamError, chunks, fill

numels = st.lists(st.integers(0, 120), max_size=5)


def vectors_of(numels, seed=0):
    """Any bits at all: also NaNs with payloads, infinities and denormals."""
    generator = torch.Generator().manual_seed(seed)
    bits = [torch.randint(-(2**31), 2**31, (n,), generator=generator) for n in numels]
    return [vector.to(torch.int32).view(torch.float32) for vector in bits]


def room_like(vectors):
    return [torch.full_like(vector, 7.0) for vector in vectors]


def bits_of(vectors):
    return [vector.view(torch.int32).tolist() for vector in vectors]


def recut(whole, cuts):
    """The same bytes in messages that end at `cuts`."""
    borders = [0, *sorted(cuts), len(whole)]
    return [whole[start:stop] for start, stop in pairwise(borders)]


@st.composite
def recut_streams(draw):
    """Vectors and their bytes, cut between any two bytes, also into empty messages."""
    vectors = vectors_of(draw(numels), draw(st.integers(0, 9)))
    whole = b"".join(chunks(vectors))
    cuts = draw(st.lists(st.integers(0, len(whole)), max_size=20))
    return vectors, recut(whole, cuts)


@given(numels, st.integers(1, 300))
@settings(deadline=None)
def test_chunks_are_bytes_no_longer_than_asked_and_fill_takes_them(numels, chunk_num_bytes):
    vectors = vectors_of(numels)
    with patch.object(stream, "CHUNK_NUM_BYTES", chunk_num_bytes):
        messages = list(chunks(vectors))
    # gRPC takes exactly `bytes`: anything else from a handler hangs the caller.
    assert all(type(message) is bytes for message in messages)
    assert all(0 < len(message) <= chunk_num_bytes for message in messages)
    assert b"".join(messages) == b"".join(v.numpy().tobytes() for v in vectors)
    arrived = room_like(vectors)
    fill(arrived, messages)
    assert bits_of(arrived) == bits_of(vectors)


@given(recut_streams())
@settings(deadline=None)
def test_any_cut_of_the_bytes_fills_the_vectors(case):
    vectors, messages = case
    arrived = room_like(vectors)
    fill(arrived, iter(messages))
    assert bits_of(arrived) == bits_of(vectors)


@given(recut_streams(), st.data())
@settings(deadline=None)
def test_too_few_bytes_are_an_error(case, data):
    vectors, messages = case
    whole = b"".join(messages)
    if not whole:
        return
    kept = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(StreamError, match=rf"{kept} bytes instead of {len(whole)}$"):
        fill(room_like(vectors), recut(whole[:kept], []))


@given(recut_streams(), st.integers(1, 50), st.booleans())
@settings(deadline=None)
def test_too_many_bytes_are_an_error(case, num_extra, joined):
    vectors, messages = case
    extra = b"\0" * num_extra
    overlong = [b"".join(messages) + extra] if joined else [*messages, extra]
    with pytest.raises(StreamError, match="more than the expected"):
        fill(room_like(vectors), overlong)


def test_an_endless_stream_is_given_up_at_the_first_excess():
    vectors = [torch.zeros(5), torch.zeros(6)]
    with pytest.raises(StreamError):
        fill(vectors, chain(repeat(b"\0" * 8)))


def test_too_many_bytes_write_nothing_beyond_the_vectors():
    memory = torch.zeros(16)
    with pytest.raises(StreamError):
        fill([memory[4:8]], [b"\1" * 12, b"\1" * 8])
    assert (memory[:4] == 0).all()
    assert (memory[8:] == 0).all()


def test_vectors_of_several_messages_keep_their_place():
    """Sizes around the real message size, into views of one flat vector."""
    quarter = CHUNK_NUM_BYTES // 4
    sizes = [quarter - 1, quarter, quarter + 1, 2 * quarter + 5, 3]
    flat = torch.arange(sum(sizes), dtype=torch.float32)
    messages = list(chunks(flat.split(sizes)))
    assert [len(m) for m in messages] == [
        CHUNK_NUM_BYTES - 4,
        CHUNK_NUM_BYTES,
        CHUNK_NUM_BYTES,
        4,
        CHUNK_NUM_BYTES,
        CHUNK_NUM_BYTES,
        20,
        12,
    ]
    arrived = torch.zeros_like(flat)
    fill(arrived.split(sizes), messages)
    assert torch.equal(arrived, flat)


def test_a_message_is_a_copy():
    """gRPC may send a message after `chunks` went on; the vector may have changed by then."""
    vector = torch.ones(8)
    (message,) = list(chunks([vector]))
    vector.zero_()
    assert message == torch.ones(8).numpy().tobytes()


def test_a_vector_with_gaps_is_a_bug():
    with pytest.raises(AssertionError):
        list(chunks([torch.zeros(8)[::2]]))
    with pytest.raises(AssertionError):
        fill([torch.zeros(8)[::2]], [b"\0" * 16])
