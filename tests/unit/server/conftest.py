"""Fixtures of the gateway's tests: a whole gateway over the fake engine, and a client for it."""

from collections.abc import AsyncIterator

import httpx
import pytest

from fake_gateway import FakeGateway, asgi_client, build_gateway


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def gateway(anyio_backend: str) -> FakeGateway:
    return build_gateway()


@pytest.fixture
async def client(gateway: FakeGateway) -> AsyncIterator[httpx.AsyncClient]:
    async with asgi_client(gateway.app) as client:
        yield client
