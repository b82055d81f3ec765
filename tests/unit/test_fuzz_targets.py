"""What `benchmarks/fuzz.py` drives: its targets take their seeds, and refuse what was found."""

import random
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from protos import parameter_server_pb2 as pb
from ps.lanes.stream import StreamError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MUTATIONS = 4
NAMES = (
    *("calls", "answers", "handshakes", "messages", "images", "metadata", "tensors"),
    *("manifests", "tars", "idx", "orders", "pictures"),
)


@pytest.fixture(autouse=True, scope="module")
def _on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def targets():
    from fuzz_targets import TARGETS

    return TARGETS


def test_these_are_all_targets(targets):
    assert set(targets) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_target_takes_one_of_its_seeds_at_least(targets, name):
    assert any(targets[name](seed) for seed in targets[name].seeds())


def mutated(seed: bytes, choice: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(choice.randint(1, MUTATIONS)):
        place = choice.randrange(len(data) + 1)
        match choice.randrange(3):
            case 0:
                data[place:place] = choice.randbytes(choice.randint(1, 4))
            case 1:
                del data[place : place + choice.randint(1, 8)]
            case _:
                data[place : place + 1] = choice.randbytes(1)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(choice=st.randoms(use_true_random=False))
def test_mutated_seeds_are_taken_or_refused_as_is_promised(targets, name, choice):
    target = targets[name]
    target(mutated(choice.choice(target.seeds()), choice))


def receipt_of_no_kind():
    return b"r" + pb.Receipt(outcome=34).SerializeToString()


def without(name: str) -> bytes:
    """Metadata that lack a value, with a checksum that is right."""
    from fuzz_targets import TARGETS

    content = TARGETS["metadata"].seeds()[1]
    assert name.encode() in content
    return content.replace(name.encode(), b"other")


def tar_of(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header of a.json that announces so many bytes."""
    member = tarfile.TarInfo("a.json")
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


FOUND = {
    "a tar whose labels have a terabyte": ("tars", lambda: tar_of(1 << 40)),
    "a tar whose long name has a terabyte": (
        "tars",
        lambda: tar_of(1 << 40, tarfile.GNUTYPE_LONGNAME),
    ),
    "a tar of a header beyond any file": ("tars", lambda: tar_of(1 << 70, tarfile.XHDTYPE)),
    "a tar of less than nothing": ("tars", lambda: tar_of(-5)),
    "a tar that follows itself": ("tars", lambda: tar_of(-512)),
    "a receipt of no kind": ("messages", receipt_of_no_kind),
    "metadata without updates": ("metadata", lambda: without("updates")),
    "metadata without extra": ("metadata", lambda: without("extra")),
    "metadata nested too deep": ("metadata", lambda: b"[" * 100_000),
    "idx of no pixels and endless rows": (
        "idx",
        lambda: bytes.fromhex("00000803 00000000 f7010101 fffffdfc"),
    ),
    "an order for endless workers": ("orders", lambda: b'{"id": 1, "num_workers": 1e999}'),
    "an order nested too deep": ("orders", lambda: b"[" * 100_000),
}


@pytest.mark.parametrize("found", FOUND)
def test_what_was_found_is_refused(targets, found):
    name, data = FOUND[found]
    target = targets[name]
    if target.refuses:
        with pytest.raises((InputError, StreamError)):
            target.decode(data())
    else:
        assert target(data())
