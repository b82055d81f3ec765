"""How a run is shown and steered by whoever drives it."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from asynception.console import Display
from asynception.orders import Orders

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Controls:
    """What a run that somebody else may look at is given; the defaults are those of a terminal."""

    display: Callable[[str, int, Console], Display] = Display
    """Makes what shows the run, from its name, its samples and the console that there is."""
    waiting: Callable[[str], None] = _log.warning
    """Called with a line that says what the run waits for before it can begin."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Once set, the run saves a checkpoint and ends as interrupted."""
    orders: Orders = field(default_factory=Orders)
    """What others ask of the run while it goes on."""
    entered: Callable[[Path], int] = lambda folder: 0
    """Called with the run's folder once it is held; returns how often drivers died before."""
