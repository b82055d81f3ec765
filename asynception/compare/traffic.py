"""What a run's last checkpoint tells besides its tensors: staleness by count, and bytes."""

from collections.abc import Mapping
from typing import Any

from asynception.compare.reading import RunRecord
from asynception.plan import plan_model
from asynception.run_folder import checkpoints_of
from model.errors import InputError
from ps.checkpoint_store import list_checkpoints, read_metadata


def staleness_histogram(run: RunRecord) -> Mapping[int, int]:
    """Receipts of kept work by staleness, in versions; empty if the run has no checkpoint."""
    extra = _extra(run)
    counts = extra.get("totals", {}).get("staleness", {})
    return {int(value): count for value, count in counts.items()}


def num_exchange_bytes(run: RunRecord) -> int | None:
    """Bytes of one pull and one push, over all servers; None if it can't be known."""
    num_classes = _extra(run).get("num_classes")
    if num_classes is None:
        return None
    try:
        plan = plan_model(run.config, num_classes)
    except InputError:  # of a model that can't be built here
        return None
    return plan.pull_num_bytes + plan.push_num_bytes


def num_bytes_moved(run: RunRecord, num_exchange_bytes: int) -> float | None:
    """Of all pulls and pushes: the bytes of one of each for each push that has receipts.

    A push goes to every server, which answers with a receipt, and a worker pulls before it.
    Retries, evaluations and checkpoints aren't in it. None without receipts. Of all-reduce, what
    each of k workers sends in a ring for a gradient: (k - 1) / k of that.
    """
    num_receipts = sum(run.result.get("receipts", {}).values())
    scaling = run.config.scaling
    share = 1 - 1 / scaling.max_workers if run.config.reduces else 1.0
    return share * num_exchange_bytes * num_receipts / scaling.num_servers or None


def _extra(run: RunRecord) -> Mapping[str, Any]:
    """What the run's last checkpoint has beside the model; empty if none can be read."""
    found = list_checkpoints(checkpoints_of(run.config, run.path))
    try:
        extra: dict[str, Any] = read_metadata(found[-1])["extra"] if found else {}
    except InputError:  # a damaged one takes only these figures from the report
        return {}
    return extra
