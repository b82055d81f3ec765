"""One-time tickets: what admits a connection that carries no token."""

import hmac
import secrets
import threading
import time
from collections.abc import Callable

TICKET_NUM_BYTES = 32
TICKET_VALID_S = 10.0
MAX_OUTSTANDING = 1024
"""Tickets kept at a time; the oldest one is dropped for one more."""


class Tickets:
    """Issued to callers that have shown the token; each opens one connection, and soon."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, valid_s: float = TICKET_VALID_S
    ) -> None:
        self._clock, self._valid_s = clock, valid_s
        self._lock = threading.Lock()
        self._expiries_s: dict[bytes, float] = {}

    def issue(self) -> bytes:
        """A new ticket: random bytes that nobody can guess."""
        ticket = secrets.token_bytes(TICKET_NUM_BYTES)
        with self._lock:
            self._forget_expired()
            if len(self._expiries_s) >= MAX_OUTSTANDING:
                del self._expiries_s[next(iter(self._expiries_s))]
            self._expiries_s[ticket] = self._clock() + self._valid_s
        return ticket

    def redeem(self, shown: bytes) -> bool:
        """Whether this ticket is good; it isn't a second time.

        Compared with every outstanding ticket in constant time, so that the time an answer takes
        tells a guesser nothing.
        """
        with self._lock:
            self._forget_expired()
            matches = [t for t in self._expiries_s if hmac.compare_digest(t, shown)]
            for ticket in matches:
                del self._expiries_s[ticket]
            return bool(matches)

    def _forget_expired(self) -> None:
        now_s = self._clock()
        for ticket in [t for t, expiry_s in self._expiries_s.items() if expiry_s <= now_s]:
            del self._expiries_s[ticket]
