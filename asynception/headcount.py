"""How many workers a run is to have, and in which places."""

from collections.abc import Collection

from asynception.config import TrainConfig
from asynception.config_scaling import spelled
from model.errors import InputError


def check_count(config: TrainConfig, num_workers: int) -> None:
    """Raises InputError for a number of workers that a live run can't change to."""
    given, scaling = f"--num-workers {num_workers}", config.scaling
    if not config.takes_joins:
        raise InputError(
            f'{given} with consistency.mode = "{config.consistency.mode}": the number of workers '
            "says how much work makes an update there, so it stays as it is; stop the run, and go "
            "on with --resume and another scaling.num_workers"
        )
    if num_workers < 1:
        raise InputError(f"{given}: nobody would train; stop the run instead, or give 1 or more")
    if num_workers > scaling.max_workers:
        raise InputError(
            f"{given}: the servers were given memory and threads for scaling.num_workers = "
            f"{spelled(scaling.num_workers)}, {scaling.max_workers} at most; stop the run, and go "
            f"on with --resume --scaling.num_workers {scaling.min_workers},{num_workers}"
        )


def places_for(
    num_workers: int, before: Collection[int], at_work: Collection[int]
) -> frozenset[int]:
    """The places for so many workers: of those before, first the ones at work, then new ones.

    Few as they are, whoever works goes on, and who waits for room is given up first.
    """
    kept = sorted(before, key=lambda worker: (worker not in at_work, worker))[:num_workers]
    unused = (worker for worker in range(num_workers + len(before)) if worker not in before)
    added = [next(unused) for _ in range(num_workers - len(kept))]
    return frozenset((*kept, *added))
