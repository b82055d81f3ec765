"""Carrying a check out: whatever it does, there is one line about it, and in time."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from asynception.doctor.finding import Finding, Verdict, fail
from asynception.failures import one_line
from model.errors import InputError

HERE = "here"
"""Where a check is carried out unless it is on another node."""


@dataclass(frozen=True)
class Check:
    """One thing to look at. `run` measures it and judges."""

    name: str
    run: Callable[[], Verdict]
    limit_s: float = 15.0
    """A check that takes longer has failed."""
    if_late: str = "see what this machine is waiting for: its disks, its network, its drivers"
    """The mend of a check that took longer."""


def carry_out(check: Check, where: str = HERE) -> Finding:
    """The finding of a check, no later than its limit.

    A check that raises, or doesn't end, fails. Its thread is left behind then: nothing can stop a
    thread that waits for a dead disk, but nobody waits for it either.
    """
    verdicts: SimpleQueue[Verdict] = SimpleQueue()
    thread = threading.Thread(
        target=lambda: verdicts.put(_run(check)), name=f"check {check.name}", daemon=True
    )
    thread.start()
    try:
        verdict = verdicts.get(timeout=check.limit_s)
    except Empty:
        verdict = fail(f"no answer in {check.limit_s:g} s", check.if_late)
    else:
        thread.join()  # it has nothing left to do, and isn't to count as one that is left behind
    return Finding(check.name, where, verdict.level, verdict.found, verdict.mend)


def _run(check: Check) -> Verdict:
    try:
        return check.run()
    except InputError as error:
        return fail(" ".join(str(error).split()), "change what the message names")
    except (Exception, SystemExit) as error:  # whatever it raises, there is a line about it
        return fail(one_line(error), f"mend what stops the check of {check.name!r}, and repeat it")


def threads_left() -> int:
    """Checks that have not ended, though nobody waits for them any more."""
    return sum(thread.name.startswith("check ") for thread in threading.enumerate())
