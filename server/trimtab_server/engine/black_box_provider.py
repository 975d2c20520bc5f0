"""The API behind which a black-box base is: one call at a time, tried again where that may help, and what it cost.

Every call is `POST {url}/completions`, OpenAI's legacy completions. The errors of httpx become ours here and nowhere
else. No message names the address or the key; a refusal of the request repeats what the provider said of it.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import stamina
from httpx_sse import EventSource, SSEError

from trimtab_adapters.contract.engine_api import ProviderStatus
from trimtab_adapters.contract.errors import (
    EngineDiedError,
    EngineError,
    EngineTimeoutError,
    EngineUnavailableError,
)
from trimtab_server.breaker import Breaker
from trimtab_server.engine.black_box_cost import Cost, cost_of
from trimtab_server.engine.black_box_errors import (
    MAX_BACKOFF_S,
    PASSES,
    NoLogprobsError,
    PassingError,
    pause_after,
    refusal,
    stream_error,
    well_formed,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_BACKOFF_S = 0.2
_JITTER_S = 0.2
_MAX_ANSWER_BYTES = 32 * 1024 * 1024
_CHECK_AGE_S = 30.0
"""How old the knowledge may be that the provider answers. Every call renews it."""
_CHECK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ProviderLimits:
    """Time and attempts of calls.

    Attributes:
        timeout_s: Of one attempt.
        deadline_s: Of one call, with waiting for a free place and between attempts.
        max_retries: Further attempts after what may pass.
        max_calls: Calls at the same time; more wait.
        breaker_threshold: Attempts in a row without an answer, after which none is made for a while.
        breaker_cooldown_s: That while.
    """

    timeout_s: float = 60.0
    deadline_s: float = 180.0
    max_retries: int = 4
    max_calls: int = 32
    breaker_threshold: int = 8
    breaker_cooldown_s: float = 15.0


class Provider:
    """A provider's completions API.

    Args:
        url: Base address with its version, such as `https://host/v1`.
        model: The base's name there.
        client: See `build_provider_client`; closed by `aclose`.
        limits: Time and attempts.
    """

    def __init__(self, url: str, model: str, client: httpx.AsyncClient, limits: ProviderLimits | None = None) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._client = client
        self._limits = limits or ProviderLimits()
        self._places = asyncio.Semaphore(self._limits.max_calls)
        self._breaker = Breaker(
            "the black box",
            threshold=self._limits.breaker_threshold,
            cooldown_s=self._limits.breaker_cooldown_s,
            is_away=lambda exc: isinstance(exc, PassingError) and exc.is_away,
            refusal=lambda message, wait_s: EngineUnavailableError(message, retry_after_s=math.ceil(wait_s)),
        )
        self._answered_at = float("-inf")
        self._num_retries = 0
        self._num_failed = 0
        self._total = Cost()

    @property
    def identity(self) -> str:
        """Model and host, without anything secret."""
        return f"{self._model} at {httpx.URL(self._url).host}"

    @property
    def status(self) -> ProviderStatus:
        """Sums since the start."""
        total = self._total
        return ProviderStatus(
            breaker=self._breaker.state.state,
            calls=total.calls,
            retries=self._num_retries,
            failed_calls=self._num_failed,
            prompt_tokens=total.prompt_tokens,
            completion_tokens=total.completion_tokens,
            cached_tokens=total.cached_tokens,
            unmapped_tokens=total.unmapped_tokens,
            resplit_calls=total.resplit_calls,
        )

    def count(self, cost: Cost) -> None:
        """Add what only its reader found out about a call."""
        self._total.add(cost)

    async def complete(self, body: Mapping[str, Any], read: Callable[[dict[str, Any]], T]) -> tuple[T, Cost]:
        """One call and its price.

        Args:
            body: The request without `model`.
            read: Makes the answer of its JSON; what it raises for a malformed one becomes an `EngineError`. After a
                `NoLogprobsError` the call is made again, and billed again.

        Raises:
            EngineRequestError: The provider refused it.
            EngineUnavailableError: It was away, too busy, or out of quota in all attempts.
            EngineTimeoutError: It took longer than a call may.
            EngineError: Its answers have another form.
        """
        cost = Cost()

        async def attempt() -> T:
            data = await self._post(body)
            with well_formed():
                price = cost_of(data.get("usage"))
            cost.add(price)
            self._total.add(price)
            with well_formed():
                return read(data)

        return await self._with_retries(attempt, self._places), cost

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed answer. Tried again only before the first of them. Raises as `complete`."""
        cost = Cost()
        async with self._places, AsyncExitStack() as stack:
            stream, chunk = await self._with_retries(lambda: self._open_stream(body), nullcontext())
            await stack.enter_async_context(aclosing(stream))
            while chunk is not None:
                with well_formed():
                    if chunk.get("usage"):
                        cost = cost_of(chunk["usage"])
                yield chunk
                try:
                    chunk = await anext(stream, None)
                except PassingError as exc:
                    raise exc.error from exc
        self._total.add(cost)

    async def check(self) -> None:
        """Make sure that the provider answers, unless it did a moment ago; costs nothing.

        Raises:
            EngineUnavailableError: It does not, or does not take the gateway's key.
        """
        if time.monotonic() - self._answered_at < _CHECK_AGE_S:
            return
        self._breaker.check()
        try:
            with self._breaker.attempt(), self._translated():
                response = await self._client.get(f"{self._url}/models", timeout=_CHECK_TIMEOUT_S)
        except PassingError as exc:
            raise exc.error from exc
        if response.status_code in (401, 403):
            raise EngineUnavailableError(
                "the black box does not take the gateway's key (TRIMTAB_BLACK_BOX_API_KEY)", retry_after_s=30
            )
        if response.status_code in PASSES:
            raise EngineUnavailableError(f"the black box answers {response.status_code}", retry_after_s=5)
        self._answered_at = time.monotonic()  # also after a 404: not everybody lists models

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _with_retries(
        self, attempt: Callable[[], Coroutine[Any, Any, T]], place: AbstractAsyncContextManager[Any]
    ) -> T:
        limits = self._limits
        retries = stamina.retry_context(
            on=pause_after,
            attempts=limits.max_retries + 1,
            timeout=None,
            wait_initial=_FIRST_BACKOFF_S,
            wait_jitter=_JITTER_S,
            wait_max=MAX_BACKOFF_S,
        )
        try:
            async with asyncio.timeout(limits.deadline_s) as deadline:
                async for number in retries:
                    with number:
                        self._num_retries += number.num > 1
                        async with place:
                            with self._breaker.attempt():
                                return await attempt()
        except PassingError as exc:
            self._num_failed += 1
            self._answered_at = float("-inf")
            raise exc.error from exc
        except TimeoutError as exc:
            self._num_failed += 1
            if not deadline.expired():
                raise
            raise EngineTimeoutError(f"the black box did not answer within {limits.deadline_s:g} s") from exc
        except NoLogprobsError as exc:
            self._num_failed += 1
            raise EngineError(
                "the black box answers without the most probable tokens (top_logprobs); steering needs them"
            ) from exc
        except EngineError:
            self._num_failed += 1
            raise
        raise AssertionError("stamina makes at least one attempt")

    async def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        content = json.dumps({**body, "model": self._model, "stream": False}).encode()
        with self._translated():
            async with self._client.stream(
                "POST", f"{self._url}/completions", content=content, timeout=self._timeout, headers=_JSON
            ) as response:
                data = bytearray()
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > _MAX_ANSWER_BYTES:
                        raise EngineError("the black box answers without end")
        if response.status_code != 200:
            raise refusal(response, bytes(data))
        self._answered_at = time.monotonic()
        with well_formed():
            answer = json.loads(bytes(data))
            if not isinstance(answer, dict):
                raise TypeError("no object")
            return answer

    async def _open_stream(
        self, body: Mapping[str, Any]
    ) -> tuple[AsyncGenerator[dict[str, Any], None], dict[str, Any] | None]:
        stream = self._chunks(body)
        try:
            return stream, await anext(stream, None)
        except BaseException:
            await stream.aclose()
            raise

    async def _chunks(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        options = {"include_usage": True}
        content = json.dumps({**body, "model": self._model, "stream": True, "stream_options": options}).encode()
        is_complete = False
        with self._translated():
            async with self._client.stream(
                "POST", f"{self._url}/completions", content=content, timeout=self._timeout, headers=_JSON
            ) as response:
                if response.status_code != 200:
                    raise refusal(response, await response.aread())
                self._answered_at = time.monotonic()
                async with aclosing(EventSource(response).aiter_sse()) as events:
                    async for event in events:
                        if event.data == "[DONE]":
                            is_complete = True
                            continue
                        with well_formed():
                            chunk = json.loads(event.data)
                            if chunk.get("error"):
                                raise stream_error(chunk["error"])
                        yield chunk
        if not is_complete:
            raise EngineDiedError("the black box broke its answer off")

    @property
    def _timeout(self) -> httpx.Timeout:
        return httpx.Timeout(self._limits.timeout_s, connect=min(10.0, self._limits.timeout_s))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the exceptions of httpx into ours, here and nowhere else."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
            raise PassingError(EngineUnavailableError("the black box cannot be reached"), is_away=True) from exc
        except httpx.TimeoutException as exc:
            message = f"the black box did not answer within {self._limits.timeout_s:g} s"
            raise PassingError(EngineUnavailableError(message), is_away=True) from exc
        except (httpx.HTTPError, SSEError) as exc:
            raise PassingError(EngineDiedError("the black box broke its answer off"), is_away=True) from exc


_JSON = {"Content-Type": "application/json"}


def build_provider_client(api_key: str | None = None) -> httpx.AsyncClient:
    """An HTTP client for a provider: no proxy and no certificates from the environment, no redirects.

    Args:
        api_key: Sent as a bearer token.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=3.0)
    return httpx.AsyncClient(limits=limits, headers=headers, trust_env=False, follow_redirects=False)
