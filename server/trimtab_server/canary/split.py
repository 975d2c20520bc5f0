"""Which requests a canary answers."""

import hashlib

_SPAN = 2**64


def takes_canary(route: str, revision: int, key: str, percent: float) -> bool:
    """Whether the request with this key is one of the canary's.

    A hash decides: the same key always gets the same answer under one revision, whatever gateway is asked, and another
    revision of the route draws anew.

    Args:
        route: Its name.
        revision: The one that has the canary.
        key: The request's id.
        percent: Of all keys.
    """
    digest = hashlib.sha256(f"{route}\0{revision}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / _SPAN < percent / 100
