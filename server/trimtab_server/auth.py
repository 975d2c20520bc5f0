"""API keys: one set opens `/v1`, another `/admin`. Keys are compared as digests, in constant time."""

import hashlib
import hmac
from collections.abc import Iterable

from fastapi import Request

from trimtab_adapters.contract.errors import AuthenticationError, PermissionDeniedError
from trimtab_server.settings import Settings


class KeySet:
    """A set of keys that can be asked about one, without telling by its timing which or how much matched."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, presented: str) -> bool:
        digest = _digest(presented)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found


class Auth:
    """Who may call what.

    With no key configured `/v1` is open, which `Settings` allows on a loopback address only. `/admin` without a key
    is open on a loopback address and closed on any other.
    """

    def __init__(self, settings: Settings) -> None:
        self._api_keys = KeySet(key.get_secret_value() for key in settings.api_keys)
        self._admin_keys = KeySet(key.get_secret_value() for key in settings.admin_keys)
        self._is_loopback_bind = settings.is_loopback_bind

    def check_api_key(self, authorization: str | None) -> None:
        """Raises `AuthenticationError` unless the header carries an API key or none is needed."""
        if self._api_keys:
            _check(self._api_keys, authorization)

    def check_admin_key(self, authorization: str | None) -> None:
        """Raises `AuthenticationError` for a missing or wrong key, `PermissionDeniedError` where `/admin` is closed."""
        if self._admin_keys:
            _check(self._admin_keys, authorization)
        elif not self._is_loopback_bind:
            raise PermissionDeniedError("The admin API is closed on this address: set TRIMTAB_ADMIN_KEYS to open it.")


async def require_api_key(request: Request) -> None:
    """Dependency of the public routes."""
    auth: Auth = request.app.state.auth
    auth.check_api_key(request.headers.get("authorization"))


async def require_admin(request: Request) -> None:
    """Dependency of the routes under `/admin`."""
    auth: Auth = request.app.state.auth
    auth.check_admin_key(request.headers.get("authorization"))


def _check(keys: KeySet, authorization: str | None) -> None:
    scheme, _, key = (authorization or "").partition(" ")
    if not authorization or scheme.lower() != "bearer" or not key.strip():
        raise AuthenticationError(
            "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer "
            "auth (i.e. Authorization: Bearer YOUR_KEY)."
        )
    if key.strip() not in keys:
        raise AuthenticationError("Incorrect API key provided.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
