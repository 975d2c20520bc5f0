"""A local HTTP server that misbehaves on demand."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[[str, Any], "Scripted | Any"]
"""From a path and the JSON body to what is answered: a JSON value, or anything at all."""


@dataclass(frozen=True)
class Scripted:
    """An answer in full: status, headers and bytes; `is_cut` sends half of the bytes and drops the connection."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    is_cut: bool = False
    pause_s: float = 0.0


@dataclass
class ScriptedServer:
    """Where it listens, what it was asked, and what it answers, which may be changed at any time."""

    url: str
    answer: Answer
    requests: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        return [path for path, _, _ in self.requests]


@asynccontextmanager
async def scripted_server(answer: Answer) -> AsyncIterator[ScriptedServer]:
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await _exchange(server, head.decode(), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    server = ScriptedServer(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", answer)
    async with listener:
        yield server
    for writer in writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _exchange(
    server: ScriptedServer, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    request, *lines = head.rstrip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    data = await reader.readexactly(int(headers.get("content-length", 0)))
    path = request.split()[1]
    body = json.loads(data) if data else None
    server.requests.append((path, body, headers))
    answer = server.answer(path, body)
    if not isinstance(answer, Scripted):
        answer = Scripted(body=json.dumps(answer).encode())
    await asyncio.sleep(answer.pause_s)
    extra = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
    writer.write(f"HTTP/1.1 {answer.status} X\r\nContent-Length: {len(answer.body)}\r\n{extra}\r\n".encode())
    writer.write(answer.body[: len(answer.body) // 2] if answer.is_cut else answer.body)
    await writer.drain()
    if answer.is_cut:
        raise ConnectionResetError
