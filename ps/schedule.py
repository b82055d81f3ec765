"""The learning rate as a pure function of a shard's clocks.

Which clock drives the decay is a setting, because it decides whether a recipe trains at all: the
paper's JFT schedule (x0.9 every 3,000,000 samples), counted in samples of the whole run, has
vanished after one pass over 350 M images (0.001 * 0.9**116 = 4.9e-9).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from model.settings import Settings

Unit = Literal["updates", "samples", "worker_samples", "epochs"]


@dataclass(frozen=True)
class Clocks:
    """A shard's progress: pushes applied, and the samples those pushes were computed from."""

    updates: int = 0
    samples: int = 0


class Horizon(Settings):
    """What turns clocks into the units that schedules are written in."""

    epoch_samples: PositiveInt
    """Samples of the training set."""
    num_workers: PositiveInt
    """Workers that share the samples of the run."""

    def position(self, clocks: Clocks, unit: Unit) -> float:
        """How far the run is, in `unit`."""
        match unit:
            case "updates":
                return clocks.updates
            case "samples":
                return clocks.samples
            case "worker_samples":
                return clocks.samples / self.num_workers
            case "epochs":
                return clocks.samples / self.epoch_samples


class _Schedule(Settings):
    lr: PositiveFloat
    """Learning rate at the start, after the warmup."""
    unit: Unit = "epochs"
    """What `every`, `length` and `warmup` count: updates, samples (of the whole run),
    worker_samples (of one worker) or epochs."""
    warmup: NonNegativeFloat = 0.0
    """Length of a linear rise from 0 at the start; 0 for none."""

    def rate(self, clocks: Clocks, horizon: Horizon) -> float:
        """The learning rate of the next update, given the clocks before it."""
        position = horizon.position(clocks, self.unit)
        rising = min(1.0, position / self.warmup) if self.warmup else 1.0
        return self.lr * self.factor(position) * rising

    def factor(self, position: float) -> float:
        raise NotImplementedError


class Constant(_Schedule):
    kind: Literal["constant"] = "constant"
    """The same learning rate throughout."""

    def factor(self, position: float) -> float:
        return 1.0


class Exponential(_Schedule):
    kind: Literal["exponential"] = "exponential"
    """Times `decay` every `every` units (both papers' schedule)."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.94
    """Factor of one step."""
    every: PositiveFloat = 2.0
    """Length of one step, in `unit`."""
    staircase: bool = True
    """Decay in steps; false decays smoothly."""

    def factor(self, position: float) -> float:
        steps = position / self.every
        return float(self.decay ** (math.floor(steps) if self.staircase else steps))


class Cosine(_Schedule):
    kind: Literal["cosine"] = "cosine"
    """Half a cosine from `lr` to `final * lr`, constant from then on."""
    length: PositiveFloat
    """Units until the end of the fall."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """What is left of `lr` at the end, as a share of it."""

    def factor(self, position: float) -> float:
        share = min(1.0, position / self.length)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * share))


Schedule = Annotated[Constant | Exponential | Cosine, Field(discriminator="kind")]
