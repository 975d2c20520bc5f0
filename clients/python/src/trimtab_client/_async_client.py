"""The asyncio client."""

from types import TracebackType
from typing import Self

import httpx

from trimtab_client._async_admin import AsyncAdmin
from trimtab_client._async_resources import AsyncChat, AsyncCompletions, AsyncFeedbacks, AsyncModels
from trimtab_client._base import DEFAULT_BASE_URL, DEFAULT_MAX_RETRIES, DEFAULT_TIMEOUT, ClientOptions
from trimtab_client._caller import AsyncCaller


class AsyncClient:
    """Like `Client`, with the same names and arguments, awaited.

    ```python
    async with AsyncClient("http://127.0.0.1:8000") as client:
        async with client.completions.stream(model="kind", prompt="The baker", max_tokens=32) as chunks:
            async for chunk in chunks:
                ...
    ```

    Cancelling a task that waits for an answer closes its connection, and the gateway stops generating.

    Args:
        base_url: Address of the gateway, without `/v1`.
        api_key: Key for `/v1`.
        admin_key: Key for `/admin`; the API key when not given.
        timeout: In seconds, or an `httpx.Timeout`. By default 5 s to connect and 600 s to read.
        max_retries: Repetitions of refused and unsent requests; 0 turns them off.
        transport: Another httpx transport, for tests or special networks.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        max_retries: int = DEFAULT_MAX_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        options = ClientOptions(base_url=base_url, api_key=api_key, admin_key=admin_key, max_retries=max_retries)
        self._caller = AsyncCaller(httpx.AsyncClient(timeout=timeout, transport=transport), options)
        self.completions = AsyncCompletions(self._caller)
        self.chat = AsyncChat(self._caller)
        self.models = AsyncModels(self._caller)
        self.feedback = AsyncFeedbacks(self._caller)
        self.admin = AsyncAdmin(self._caller)

    async def close(self) -> None:
        """Close the connections."""
        await self._caller.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
