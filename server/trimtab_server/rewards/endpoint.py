"""Calls to a server that scores. The errors of httpx become ours here and nowhere else.

No message names the server's address or repeats what it said: callers of a reward may not be meant to know either.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Annotated, Any

import httpx
from pydantic import Field

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError, RewardUnavailableError
from trimtab_server.rewards.limits import RewardLimits

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 16 * 1024 * 1024
KEY_PREFIX = "TRIMTAB_REWARD_"
"""What the name of an environment variable with a key must begin with, so that registering a reward cannot send other
secrets of the gateway to an address of one's choice."""

_PASSES = frozenset({408, 425, 429, 502, 503, 504})
_CONNECT_S = 5.0
_KEPT_ALIVE_S = 2.0


class EndpointOptions(RewardLimits):
    """Options of all kinds that call a server."""

    timeout_s: float = Field(default=30.0, gt=0, le=3600)
    deadline_s: float = Field(default=120.0, gt=0, le=3600)
    api_key_env: Annotated[str, Field(pattern=rf"^{KEY_PREFIX}[A-Z0-9_]{{1,64}}$")] | None = None
    """Name of the environment variable of the gateway that holds the server's key; it is sent as a bearer token."""


class Endpoint:
    """A server's address, with how to call it.

    Args:
        reward: Name of the reward, for messages.
        url: Base address.
        client: See `build_reward_client`.
        api_key: Sent as a bearer token.
    """

    def __init__(self, reward: str, url: str, client: httpx.AsyncClient, api_key: str | None = None) -> None:
        self._reward = reward
        self._url = url.rstrip("/")
        self._client = client
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def get(self, path: str) -> Any:
        """See `post`."""
        return await self._send("GET", path)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON value that the server answers.

        Args:
            path: Added to the address; may be empty.
            body: Sent as JSON.

        Raises:
            RewardUnavailableError: There is no connection, it broke, or the server says that it is too busy.
            RewardError: Any other answer than a JSON value with status 200.
        """
        # ASCII escapes carry any text, lone surrogates of a cut-off emoji too.
        content = json.dumps(body, allow_nan=False).encode()
        return await self._send("POST", path, content)

    async def _send(self, method: str, path: str, content: bytes | None = None) -> Any:
        headers = self._headers | ({"Content-Type": "application/json"} if content is not None else {})
        with self._translated():
            async with self._client.stream(
                method, self._url + path, content=content, headers=headers, follow_redirects=False
            ) as response:
                self._check_status(response)
                data = bytearray()
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > MAX_ANSWER_BYTES:
                        raise RewardError(f"the server of the reward {self._reward!r} answers without end")
        try:
            return json.loads(bytes(data))
        except (ValueError, RecursionError) as exc:
            raise RewardError(f"the server of the reward {self._reward!r} did not answer JSON") from exc

    def _check_status(self, response: httpx.Response) -> None:
        if response.status_code == 200:
            return
        status = f"{response.status_code} {response.reason_phrase}".rstrip()
        message = f"the server of the reward {self._reward!r} answered {status}"
        if response.status_code in _PASSES:
            raise RewardUnavailableError(message, retry_after_s=_retry_after_s(response.headers.get("Retry-After")))
        if response.status_code in (400, 413, 422):
            message += "; as a rule a text is empty, or longer than it reads"
        elif response.is_redirect:
            message += "; redirects are not followed, so register the final address"
        raise RewardError(message)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        server = f"the server of the reward {self._reward!r}"
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
            raise RewardUnavailableError(f"{server} cannot be reached") from exc
        except httpx.TimeoutException as exc:
            raise RewardUnavailableError(f"{server} does not answer") from exc
        except httpx.DecodingError as exc:
            raise RewardError(f"{server} did not answer JSON") from exc
        except httpx.HTTPError as exc:
            raise RewardUnavailableError(f"{server} broke its answer off") from exc


def build_reward_client() -> httpx.AsyncClient:
    """An HTTP client for servers of rewards: no proxy and no certificates from the environment.

    It has no limit on time but that on connecting: whoever calls has one.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=_KEPT_ALIVE_S)
    return httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(None, connect=_CONNECT_S), trust_env=False)


def build_endpoint(
    reward: str, url: str, options: EndpointOptions, client: httpx.AsyncClient, environment: Mapping[str, str]
) -> Endpoint:
    """The server of a registered reward.

    Raises:
        InvalidRequestError: The address is none, holds a secret, or the key is not in the environment.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise InvalidRequestError(f"the target is no URL: {exc}", param="target") from exc
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidRequestError("the target must be an http:// or https:// address", param="target")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise InvalidRequestError(
            "the target must hold no user, password, query or fragment; a key goes into an environment variable, see "
            "options.api_key_env",
            param="target",
        )
    api_key = None
    if options.api_key_env is not None and not (api_key := environment.get(options.api_key_env)):
        raise InvalidRequestError(
            f"the environment variable {options.api_key_env} is not set where the gateway runs",
            param="options.api_key_env",
        )
    return Endpoint(reward, url, client, api_key)


def _retry_after_s(header: str | None) -> float | None:
    """Seconds from a `Retry-After`, which may be a number or a date."""
    if header is None:
        return None
    if header.strip().isascii() and header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
