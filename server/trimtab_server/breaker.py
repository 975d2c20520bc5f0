"""A circuit breaker: a server that does not answer is left alone for a while, and callers are told at once."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from purgatory import SyncCircuitBreakerFactory

from trimtab_adapters.contract.errors import TrimtabError

_STATES: dict[str, Literal["closed", "open", "half_open"]] = {
    "closed": "closed",
    "opened": "open",
    "half-opened": "half_open",
}


@dataclass(frozen=True, slots=True)
class BreakerState:
    """A breaker at one moment.

    Attributes:
        state: `closed` lets attempts through, `open` none, `half_open` one to see whether the server is back.
        opened_at: When it opened, in seconds since 1970; None while it is closed.
        retry_at: When the next attempt is let through.
    """

    state: Literal["closed", "open", "half_open"]
    opened_at: float | None = None
    retry_at: float | None = None


class Breaker:
    """Counts attempts in a row that found somebody away; any other outcome shows that they answer.

    Args:
        subject: Who, for messages: `the reward 'x'`.
        threshold: How many open the breaker.
        cooldown_s: How long it stays open. Then one attempt decides.
        is_away: Whether an error is of this kind.
        refusal: Makes the error of an attempt that is not let through, from its message and the seconds to wait.
    """

    def __init__(
        self,
        subject: str,
        *,
        threshold: int,
        cooldown_s: float,
        is_away: Callable[[BaseException], bool],
        refusal: Callable[[str, float], TrimtabError],
    ) -> None:
        self._subject = subject
        self._threshold = threshold
        self._cooldown_s = cooldown_s
        self._new_refusal = refusal
        # The synchronous one: it only counts, and never waits for anything.
        factory = SyncCircuitBreakerFactory(exclude=[(BaseException, lambda exc: not is_away(exc))])
        self._circuit = factory.get_breaker(subject, threshold=threshold, ttl=cooldown_s)
        self._opened_at = 0.0
        self._is_trying = False

    @property
    def state(self) -> BreakerState:
        """Where it stands."""
        context = self._circuit.context
        state = _STATES[context.state]
        if state == "closed":
            return BreakerState("closed")
        # A half-open circuit has forgotten when it opened.
        self._opened_at = context.opened_at or self._opened_at
        return BreakerState(state, self._opened_at, self._opened_at + self._cooldown_s)

    def check(self) -> None:
        """Raise the refusal when no attempt would be let through now."""
        now, breaker = time.time(), self.state
        if breaker.retry_at is not None and (now <= breaker.retry_at or self._is_trying):
            raise self._refusal(now, breaker)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Around one attempt. Raises the refusal when it is not let through."""
        self.check()
        is_trial = self.state.state != "closed"
        self._is_trying = self._is_trying or is_trial
        try:
            with self._circuit:
                yield
        finally:
            if is_trial:
                self._is_trying = False

    def _refusal(self, now: float, breaker: BreakerState) -> TrimtabError:
        wait_s = max(0.0, (breaker.retry_at or now) - now)
        since_s = now - (breaker.opened_at or now)
        when = f"it is tried again in {math.ceil(wait_s)} s" if wait_s else "it is being tried again now"
        return self._new_refusal(
            f"{self._subject} is not asked since {since_s:.0f} s ago, because {self._threshold} attempts in a row got "
            f"no answer; {when}",
            max(1.0, wait_s),
        )
