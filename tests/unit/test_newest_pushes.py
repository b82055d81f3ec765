"""What a version says of the pushes in it is so: its own parameters are the account."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_shards import NUM_PARAMETERS, push_of, shard_of

from ps.client import ahead, behind
from ps.consistency import Async, Sync
from ps.lanes.stream import StreamError
from ps.messages import newest_pushes_from, newest_pushes_message
from ps.shard import Outcome, Shard

NUM_WORKERS = 3
TAKEN = (Outcome.APPLIED, Outcome.ACCUMULATED)

steps = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "late push", "nan", "fence", "image"]),
        st.integers(0, NUM_WORKERS - 1),
    ),
    max_size=NUM_PARAMETERS,
)


def is_in(newest, key):
    """Whether a push is among those that were settled when a version was made."""
    worker, *push = key
    return worker in newest and (push[0] < newest[worker][0] or tuple(push) <= newest[worker])


class Life:
    def __init__(self):
        self.incarnation = self.sequence = 0


@pytest.mark.parametrize(
    "policy", [Async(), Async(max_staleness=1), Sync(), Sync(backup_workers=1)], ids=repr
)
@given(steps=steps)
def test_exactly_the_pushes_that_are_said_to_be_in_a_version_have_moved_it(policy, steps):
    """Push number n moves parameter n alone."""
    shard = shard_of(policy, NUM_WORKERS, start=0.0)
    lives = [Life() for _ in range(NUM_WORKERS)]
    kept: dict[int, tuple[int, int, int]] = {}
    for number, (what, worker) in enumerate(steps):
        life = lives[worker]
        if what == "fence":
            life.incarnation, life.sequence = life.incarnation + 1, 0
            shard.fence(worker, life.incarnation)
        elif what == "image":
            shard = Shard.of_image(shard.config, shard.image())
        else:
            gradient = torch.zeros(NUM_PARAMETERS, dtype=torch.float64)
            gradient[number] = torch.nan if what == "nan" else 1.0
            version = max(0, shard.version - 2 * (what == "late push"))
            key = (worker, life.incarnation, life.sequence)
            push = push_of(worker, life.sequence, version, gradient, incarnation=life.incarnation)
            if shard.push(push).outcome in TAKEN:
                kept[number] = key
            life.sequence += 1
        snapshot = shard.pin()
        moved = set(snapshot.parameters.nonzero().flatten().tolist())
        assert moved == {n for n, key in kept.items() if is_in(snapshot.newest_pushes, key)}
        shard.release(snapshot)


def test_lists_that_do_not_go_together_are_refused():
    message = newest_pushes_message({0: (1, 5), 3: (0, 7)})
    assert newest_pushes_from(message) == {0: (1, 5), 3: (0, 7)}
    message.sequences.append(4)
    with pytest.raises(StreamError, match="newest pushes"):
        newest_pushes_from(message)


sequences = st.dictionaries(
    st.integers(0, 2), st.dictionaries(st.integers(0, 2), st.integers(0, 5), min_size=1)
)


@given(st.lists(sequences, min_size=1, max_size=3))
def test_what_is_behind_is_everywhere_and_what_is_ahead_is_somewhere(shards):
    def has(shard, push):
        worker, life, sequence = push
        return sequence <= shard.get(worker, {}).get(life, -1)

    everywhere, somewhere = behind(shards), ahead(shards)
    for push in ((w, life, s) for w in range(3) for life in range(3) for s in range(6)):
        assert has(everywhere, push) == all(has(shard, push) for shard in shards)
        assert has(somewhere, push) == any(has(shard, push) for shard in shards)
