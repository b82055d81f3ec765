"""What is true of every verdict, and an order among them."""

from asynception.doctor.finding import Verdict

GRAVITY = {"ok": 0, "warn": 1, "fail": 2}


def gravity(verdict: Verdict) -> int:
    """How bad it is, once it is known to be one line that names a mend if one is needed."""
    assert verdict.found
    assert "\n" not in verdict.found + verdict.mend
    assert bool(verdict.mend) == (verdict.level != "ok")
    return GRAVITY[verdict.level]
