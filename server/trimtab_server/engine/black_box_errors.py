"""What goes wrong with a provider: which of it may pass, and what the caller is told.

```
PassingError       another attempt may mend it; carries the caller's error
NoLogprobsError    an answer without what steering needs; another attempt may have it
```
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from trimtab_adapters.contract.errors import EngineError, EngineRequestError, EngineUnavailableError

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 20.0
"""Longest wait before another attempt. A provider that asks for more is left to the caller, who is told how much."""

PASSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses of servers that may answer the same request a moment later."""

_GATEWAYS_FAULT = frozenset({401, 403, 404, 405})
"""Refusals that concern the gateway's key, address or model, not what the caller asked."""
_QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached"})


class PassingError(Exception):
    """What another attempt may mend.

    Args:
        error: What the caller is told when it does not.
        wait_s: When the provider wants to be asked again, where it said so.
        is_away: Whether there was no answer at all.
    """

    def __init__(self, error: EngineError, *, wait_s: float | None = None, is_away: bool = False) -> None:
        super().__init__(error.message)
        self.error = error
        self.wait_s = wait_s
        self.is_away = is_away


class NoLogprobsError(Exception):
    """An answer without log-probabilities: some providers leave them out when the sampled token ends the text."""


def pause_after(exc: Exception) -> bool | float:
    """Whether to try again after an error, and when, if the provider said so; stamina's hook."""
    if isinstance(exc, NoLogprobsError):
        return True
    if not isinstance(exc, PassingError):
        return False
    if exc.wait_s is None:
        return True
    return exc.wait_s if exc.wait_s <= MAX_BACKOFF_S else False


def refusal(response: httpx.Response, data: bytes) -> Exception:
    """What an answer with an error status means."""
    status, error = response.status_code, _error_object(data)
    message = str(error.get("message") or f"the black box answered {status}")
    if error.get("code") in _QUOTA or error.get("type") in _QUOTA:
        logger.error("the black box: %s", message)
        return EngineUnavailableError("the gateway's quota at the black box is used up", retry_after_s=60)
    if status in PASSES:
        wait_s = _retry_after_s(response.headers)
        shown = 1 if wait_s is None else max(1, math.ceil(wait_s))
        busy = "is too busy" if status == 429 else f"answers {status}"
        return PassingError(EngineUnavailableError(f"the black box {busy}", retry_after_s=shown), wait_s=wait_s)
    if status in _GATEWAYS_FAULT or response.is_redirect:
        logger.error("the black box refuses the gateway with %d: %s", status, message)
        return EngineRequestError(message, engine_status=502, error=error)
    return EngineRequestError(message, engine_status=status, error=error)


def stream_error(error: object) -> EngineError:
    """What an error inside a stream means; what was sent before it cannot be sent again."""
    message = error.get("message") if isinstance(error, dict) else None
    return EngineRequestError(str(message or "the black box failed"), engine_status=502)


def _error_object(data: bytes) -> dict[str, Any]:
    try:
        error = json.loads(data).get("error")
    except (ValueError, AttributeError):
        return {}
    return error if isinstance(error, dict) else {"message": str(error)} if error else {}


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `Retry-After`, which may be a number or a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        try:
            seconds = float(value) / unit
        except ValueError:
            continue
        return seconds if 0 <= seconds < math.inf else None
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


@contextmanager
def well_formed() -> Iterator[None]:
    """An answer in an unexpected shape is the provider's error, not a `KeyError`."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as exc:
        raise EngineError(f"the black box's answer has an unexpected form: {exc!r}") from exc
