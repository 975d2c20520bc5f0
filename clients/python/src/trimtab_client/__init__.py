"""Client for a Trimtab gateway: an OpenAI-compatible API with steering by adapter LMs, best-of-N and rollouts."""

from trimtab_client._async_client import AsyncClient
from trimtab_client._client import Client
from trimtab_client._errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadGatewayError,
    BadRequestError,
    ConflictError,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    ServiceUnavailableError,
    StreamInterruptedError,
    TrimtabError,
    UnprocessableEntityError,
)
from trimtab_client._stream import AsyncStream, Stream
from trimtab_client._version import __version__

__all__ = [
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BadGatewayError",
    "BadRequestError",
    "Client",
    "ConflictError",
    "InternalServerError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestTooLargeError",
    "ServiceUnavailableError",
    "Stream",
    "StreamInterruptedError",
    "TrimtabError",
    "UnprocessableEntityError",
    "__version__",
]
