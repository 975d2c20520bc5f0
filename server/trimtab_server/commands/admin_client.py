"""The admin API over HTTP, as commands use it."""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx

from trimtab_server.commands.errors import CommandError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TIMEOUT = httpx.Timeout(10.0, read=600.0)  # registering a version may load gigabytes


class AdminClient:
    """A connection to one gateway. Use it as a context manager; all calls raise `CommandError`.

    Args:
        url: Base URL of the gateway.
        admin_key: None where the gateway asks for none.
        transport: Replaces the network, for tests.
    """

    def __init__(self, url: str, admin_key: str | None = None, *, transport: httpx.BaseTransport | None = None) -> None:
        self._url = url.rstrip("/")
        if not self._url.startswith(("http://", "https://")):
            raise CommandError(f"{url!r} is not a gateway's address; write --url http://host:port")
        self._http = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {admin_key}"} if admin_key else {},
            timeout=_TIMEOUT,
            transport=transport,
            trust_env=urlsplit(self._url).hostname not in _LOOPBACK,  # a proxy cannot reach this machine's loopback
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._http.close()

    def get(self, *path: str, params: Mapping[str, Any] | None = None) -> Any:
        """GET; returns the decoded answer."""
        return self._call("GET", path, params=params)

    def post(self, *path: str, body: Mapping[str, Any] | None = None) -> Any:
        """POST a JSON body."""
        return self._call("POST", path, body=body if body is not None else {})

    def put(self, *path: str, body: Mapping[str, Any]) -> Any:
        """PUT a JSON body."""
        return self._call("PUT", path, body=body)

    def delete(self, *path: str) -> None:
        """DELETE."""
        self._call("DELETE", path)

    def download(self, *path: str, params: Mapping[str, Any], target: Path) -> int:
        """GET into a file, which appears under its name only when it is complete; returns its size in bytes."""
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        size_bytes = 0
        try:
            with self._translated(), self._http.stream("GET", _path(path), params=_given(params)) as response:
                if response.is_error:
                    response.read()
                    raise _refusal(response)
                with temporary.open("xb") as file:
                    for chunk in response.iter_bytes():
                        size_bytes += len(chunk)
                        file.write(chunk)
            temporary.replace(target)
        except OSError as exc:
            raise CommandError(f"{target} cannot be written: {exc.strerror}") from exc
        finally:
            temporary.unlink(missing_ok=True)
        return size_bytes

    def _call(
        self,
        method: str,
        path: tuple[str, ...],
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Any:
        with self._translated():
            response = self._http.request(method, _path(path), params=_given(params or {}), json=body)
        if response.is_error:
            raise _refusal(response)
        if response.status_code == 204:
            return None
        try:
            return response.json()
        except ValueError as exc:
            raise CommandError(f"{self._url} does not answer like a Trimtab gateway; check --url") from exc

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as exc:
            raise CommandError(
                f"no gateway answers at {self._url}: start one with `trimtab serve --model MODEL`, or give the right "
                f"address with --url or TRIMTAB_URL ({exc})"
            ) from exc
        except httpx.TimeoutException as exc:
            raise CommandError(f"the gateway at {self._url} did not answer in time") from exc
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise CommandError(f"the connection to {self._url} failed: {exc}") from exc


def _path(parts: tuple[str, ...]) -> str:
    return "/admin/" + "/".join(quote(part, safe="") for part in parts)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _refusal(response: httpx.Response) -> CommandError:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{response.request.url} answered HTTP {response.status_code}; is this a Trimtab gateway?"
    if response.status_code == 401:
        message += " Give the admin key with --admin-key or TRIMTAB_ADMIN_KEY."
    return CommandError(message)
