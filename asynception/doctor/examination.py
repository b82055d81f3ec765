"""All checks of a machine or a cluster, for a recipe or in general."""

from collections.abc import Iterator
from functools import partial

from asynception.config import RunConfig, TrainConfig
from asynception.doctor import node, storage
from asynception.doctor.finding import Finding, Verdict
from asynception.doctor.needs import Needs, derive_needs, judge_needs
from asynception.doctor.ray_nodes import examine_cluster
from asynception.doctor.timed import Check, carry_out

RECIPE_LIMIT_S = 120.0
"""For building the model, and reading the labels of a set without data.num_classes."""


def examine(config: TrainConfig | None, address: str | None) -> Iterator[Finding]:
    """One finding after another, none of which takes longer than its check's limit.

    address: of the Ray cluster whose nodes are examined; None for this machine alone. Runs are
    stored by the process that starts them, so storage is looked at here in both cases.
    """
    needs: Needs | None = None
    if config is not None:
        derived: list[Needs] = []
        yield carry_out(Check("recipe", partial(_derive, config, derived), RECIPE_LIMIT_S))
        needs = derived[0] if derived else None
    yield from examine_cluster(address, needs) if address else node.examine(needs, node.Place())
    yield _storage(config, needs)


def _derive(config: TrainConfig, derived: list[Needs]) -> Verdict:
    """Adds what the recipe needs to `derived`. Raises InputError."""
    needs = derive_needs(config)
    derived.append(needs)
    return judge_needs(needs)


def _storage(config: TrainConfig | None, needs: Needs | None) -> Finding:
    measure = partial(
        storage.measure_storage,
        config.run.storage_path if config else RunConfig().storage_path,
        needs.checkpoint_num_bytes if needs else 0,
        config.checkpoint.num_to_keep if config else None,
    )
    return carry_out(Check("storage", measure, storage.LIMIT_S))
