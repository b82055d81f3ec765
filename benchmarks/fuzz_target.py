"""A decoder for `fuzz.py` to drive."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A decoder, what it may raise, and some bytes that it takes or nearly takes."""

    decode: Callable[[bytes], None]
    refuses: tuple[type[BaseException], ...]
    seeds: Callable[[], Sequence[bytes]]

    def __call__(self, data: bytes) -> bool:
        """Whether the bytes were taken. Raises what is a bug."""
        try:
            self.decode(data)
        except self.refuses:
            return False
        return True
