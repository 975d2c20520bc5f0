"""The blocking client."""

from types import TracebackType
from typing import Self

import httpx

from trimtab_client._admin import Admin
from trimtab_client._base import DEFAULT_BASE_URL, DEFAULT_MAX_RETRIES, DEFAULT_TIMEOUT, ClientOptions
from trimtab_client._caller import Caller
from trimtab_client._resources import Chat, Completions, Feedbacks, Models


class Client:
    """Calls a gateway and waits for the answers.

    ```python
    with Client("http://127.0.0.1:8000") as client:
        completion = client.completions.create(model="kind", prompt="The baker", max_tokens=32, best_of=8)
        print(completion.choices[0].text)
    ```

    Safe to share between threads.

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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        options = ClientOptions(base_url=base_url, api_key=api_key, admin_key=admin_key, max_retries=max_retries)
        self._caller = Caller(httpx.Client(timeout=timeout, transport=transport), options)
        self.completions = Completions(self._caller)
        self.chat = Chat(self._caller)
        self.models = Models(self._caller)
        self.feedback = Feedbacks(self._caller)
        self.admin = Admin(self._caller)

    def close(self) -> None:
        """Close the connections."""
        self._caller.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
