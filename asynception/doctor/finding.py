"""What a check finds: whether that will do, the figures, and the mend."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check, before it is known whose and where."""

    level: Level
    """ok: will do. warn: works, but worse than it could. fail: a run would stop or crawl."""
    found: str
    """What was measured, in one line."""
    mend: str = ""
    """What to do about it; empty for ok."""


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's report."""

    check: str
    where: str
    """The node's address, or "here" for the machine that the command runs on."""
    level: Level
    found: str
    mend: str


def ok(found: str) -> Verdict:
    """It will do."""
    return Verdict("ok", found)


def warn(found: str, mend: str) -> Verdict:
    """It works, but worse than it could."""
    return Verdict("warn", found, mend)


def fail(found: str, mend: str) -> Verdict:
    """A run would stop or crawl, if it started at all."""
    return Verdict("fail", found, mend)
