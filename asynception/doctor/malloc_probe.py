"""Prints whether this process's allocator keeps large blocks once it is tuned, as JSON.

A process of its own, since tuning is for good.
"""

import json
import resource

from ps.malloc import tune_malloc

NUM_BYTES = 64 << 20


def probe() -> dict[str, float]:
    """Page faults of a block, and of one like it after the first was freed."""
    taken = tune_malloc()
    return {"taken": taken, "first": _faults_of_a_block(), "again": _faults_of_a_block()}


def _faults_of_a_block() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * NUM_BYTES  # written to: every page is there
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del block
    return faults


if __name__ == "__main__":
    print(json.dumps(probe()))
