from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter, Depends
from pydantic import ValidationError

from fake_gateway import asgi_client, build_gateway
from trimtab_server.auth import require_admin
from trimtab_server.settings import Settings, is_loopback

pytestmark = pytest.mark.anyio


def admin_router() -> APIRouter:
    router = APIRouter(prefix="/admin", dependencies=[Depends(require_admin)])
    router.add_api_route("/ping", lambda: {"pong": True})
    return router


async def status_of(client: httpx.AsyncClient, path: str, authorization: str | None) -> int:
    headers = {"authorization": authorization} if authorization is not None else {}
    return (await client.get(path, headers=headers)).status_code


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer one", 200),
        ("bearer two", 200),
        ("Bearer three", 401),
        ("Bearer boss", 401),  # an admin key is no API key
        ("Bearer one two", 401),
        ("Basic one", 401),
        ("one", 401),
        ("Bearer ", 401),
        ("", 401),
        (None, 401),
    ],
)
async def test_v1_needs_an_api_key_when_keys_are_set(authorization: str | None, status: int) -> None:
    gateway = build_gateway(api_keys=("one", "two"), admin_keys=("boss",))
    async with asgi_client(gateway.app) as client:
        assert await status_of(client, "/v1/models", authorization) == status


async def test_a_refused_key_is_an_openai_error_that_does_not_repeat_it() -> None:
    async with asgi_client(build_gateway(api_keys=("one",)).app) as client:
        response = await client.get("/v1/models", headers={"authorization": "Bearer sk-secret"})
        missing = await client.get("/v1/models")
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "sk-secret" not in response.text
    assert response.headers["www-authenticate"] == "Bearer"
    assert "didn't provide an API key" in missing.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_every_route_that_reaches_the_engine_needs_the_key(path: str) -> None:
    async with asgi_client(build_gateway(api_keys=("one",)).app) as client:
        assert (await client.post(path, json={})).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/metrics", "/version"])
async def test_probes_need_no_key(path: str) -> None:
    async with asgi_client(build_gateway(api_keys=("one",)).app) as client:
        assert (await client.get(path)).status_code == 200


async def test_without_keys_v1_and_admin_are_open_on_loopback() -> None:
    async with asgi_client(build_gateway(parts={"routers": [admin_router()]}).app) as client:
        assert await status_of(client, "/v1/models", None) == 200
        assert await status_of(client, "/v1/models", "Bearer EMPTY") == 200
        assert await status_of(client, "/admin/ping", None) == 200


async def test_admin_has_its_own_keys() -> None:
    gateway = build_gateway(api_keys=("one",), admin_keys=("boss",), parts={"routers": [admin_router()]})
    async with asgi_client(gateway.app) as client:
        assert await status_of(client, "/admin/ping", "Bearer boss") == 200
        assert await status_of(client, "/admin/ping", "Bearer one") == 401
        assert await status_of(client, "/admin/ping", None) == 401


async def test_admin_without_a_key_is_closed_on_a_public_address() -> None:
    gateway = build_gateway(host="0.0.0.0", api_keys=("one",), parts={"routers": [admin_router()]})
    async with asgi_client(gateway.app) as client:
        response = await client.get("/admin/ping", headers={"authorization": "Bearer one"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "permission_denied")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_loopback_addresses(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_a_public_address_without_keys_is_refused_at_start(host: str) -> None:
    with pytest.raises(ValidationError, match="TRIMTAB_API_KEYS"):
        Settings(host=host)
    assert Settings(host=host, api_keys=("one",)).host == host


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "API_KEYS": "sk-one, sk-two",
        "ADMIN_KEYS": "boss",
        "ENGINE_URLS": "http://a:1/,http://b:2",
        "ADAPTERS": "kind=/adapters/kind,other=rel/dir",
        "ENGINE_ARGS": "--max-model-len 512 --served-model-name 'my model'",
        "ROLLOUTS": "async",
        "PORT": "9000",
        "MODEL": "org/base",
    }.items():
        monkeypatch.setenv(f"TRIMTAB_{name}", value)
    settings = Settings()
    assert [key.get_secret_value() for key in settings.api_keys] == ["sk-one", "sk-two"]
    assert settings.engine_urls == ("http://a:1", "http://b:2")
    assert settings.adapters == {"kind": Path("/adapters/kind"), "other": Path("rel/dir")}
    assert settings.engine_args == ("--max-model-len", "512", "--served-model-name", "my model")
    assert (settings.rollouts, settings.port, settings.base_model) == ("async", 9000, "org/base")
    assert "sk-one" not in repr(settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"rollouts": "sometimes"},
        {"adapters": "kind"},
        {"adapters": "kind=a,kind=b"},
        {"engine_urls": ("ftp://a",)},
        {"api_keys": ("",)},
        {"calibration_size": 0},
        {"unknown": 1},
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**wrong)  # type: ignore[arg-type]


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        setattr(Settings(), "port", 1)  # noqa: B010 mypy knows it
