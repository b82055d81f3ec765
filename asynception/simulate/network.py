"""A network that delays, loses, repeats and cuts off, by a seed."""

from collections.abc import Collection
from dataclasses import dataclass, field

from asynception.simulate.world import Party, World

SLOW, SLOW_S = 0.05, 0.5
"""Share of a stream's messages that take up to so long."""


@dataclass(frozen=True)
class Weather:
    """How often what goes wrong, until the network heals."""

    latency_s: float = 0.005
    """Mean of what a message takes."""
    lost: float = 0.0
    """Share of messages."""
    repeated: float = 0.0
    """Share of calls that arrive a second time."""
    late: float = 0.0
    """Share of messages that take up to `late_s`: a call may then be carried out long after its
    caller gave it up and made it again by another connection."""
    late_s: float = 0.0
    heals_s: float = 0.0
    """From then on all messages arrive, once and in time."""


@dataclass
class _Cut:
    side: Collection[str]
    until_s: float


@dataclass
class Network:
    """What becomes of each message."""

    world: World
    weather: Weather
    _cuts: list[_Cut] = field(default_factory=list)

    @property
    def healed(self) -> bool:
        """Whether nothing is lost any more."""
        return self.world.now_s >= self.weather.heals_s

    def cut_off(self, side: Collection[str], seconds: float) -> None:
        """Lose all messages between these parties, by name, and all others."""
        until_s = min(self.world.now_s + seconds, self.weather.heals_s)
        self.world.note(f"cut off {sorted(side)} until {until_s:.3f}")
        self._cuts.append(_Cut(side, until_s))

    def delay_s(self, source: Party, target: Party) -> float | None:
        """What a message takes; None if it is lost."""
        random, weather = self.world.random, self.weather
        seconds = random.expovariate(1 / weather.latency_s)
        if self.healed:
            return seconds
        if self._is_cut(source.name, target.name) or random.random() < weather.lost:
            return None
        if random.random() < weather.late:
            seconds += random.uniform(0, weather.late_s)
        return seconds

    def repeats(self) -> bool:
        """Whether a call arrives a second time."""
        return not self.healed and self.world.random.random() < self.weather.repeated

    def gap_s(self) -> float:
        """Between two pieces of a stream. Some readers and writers are slow."""
        dice = self.world.random
        slow_s = dice.uniform(0, SLOW_S) if dice.random() < SLOW else 0.0
        return dice.expovariate(4 / self.weather.latency_s) + slow_s

    def _is_cut(self, one: str, other: str) -> bool:
        now_s = self.world.now_s
        return any(
            now_s < cut.until_s and (one in cut.side) != (other in cut.side) for cut in self._cuts
        )
