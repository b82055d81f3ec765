"""Which of several processes that failed together tells why: the others only miss it."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from asynception.supervisor import cause_of
from model.errors import InputError

GRACE_S = 3.0
"""A rank's death is known that long after the others have noticed it, and tells more."""


def errors_among(references: Sequence[Any]) -> dict[Any, RayError]:
    """By Ray reference, the errors of those that have failed, or do within `GRACE_S`."""
    if not references:
        return {}
    ready, _ = ray.wait(list(references), num_returns=len(references), timeout=GRACE_S)
    errors: dict[Any, RayError] = {}
    for reference in ready:
        try:
            ray.get(reference)
        except RayError as error:
            errors[reference] = error
    return errors


def precedence(error: RayError) -> int:
    """What tells more of why a group was lost comes first: RuntimeError is what the others get."""
    if isinstance(error, InputError):
        return 0
    if isinstance(error, RayActorError):
        return 1
    return 3 if isinstance(cause_of(error), RuntimeError) else 2
