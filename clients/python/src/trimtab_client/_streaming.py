"""Server-sent events: bytes in, events out; no input or output of its own.

The format is the HTML standard's `text/event-stream`. Lines end in LF, CRLF or CR and in nothing else: text of a model
may hold U+2028 or U+0085 unescaped, where `str.splitlines` and so httpx's `iter_lines` would cut the JSON in two.
"""

import json
from collections.abc import Iterator
from typing import Any

from trimtab_client._errors import APIResponseError, StreamInterruptedError, stream_error

DONE = "[DONE]"


class EventDecoder:
    """Turns the bytes of one response into the `data` of its events; keeps what is not complete yet."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The data of each event that this chunk completes."""
        buffer = self._rest + chunk
        held = b""
        if buffer.endswith(b"\r"):  # a line end by itself, or the first half of a CRLF: the next chunk tells
            buffer, held = buffer[:-1], b"\r"
        lines = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + held
        for line in lines:
            data = self._line(line.decode("utf-8", errors="replace"))
            if data is not None:
                yield data

    def _line(self, line: str) -> str | None:
        if line == "":
            if not self._data:
                return None
            data, self._data = "\n".join(self._data), []
            return data
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        return None  # comments (keep-alives) and the fields event, id and retry carry nothing for us


class ChunkDecoder:
    """Turns the bytes of a completion stream into its JSON objects.

    An error event raises; a stream that ends before `[DONE]` is an error too, see `close`.
    """

    def __init__(self, request_id: str | None = None) -> None:
        self._events = EventDecoder()
        self._request_id = request_id
        self.is_done = False

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """The objects that this chunk completes.

        Raises:
            APIStatusError: An error event.
            APIResponseError: An event that is not a JSON object.
        """
        for data in self._events.feed(chunk):
            if self.is_done:
                return
            if data.strip() == DONE:
                self.is_done = True
                return
            yield self._parse(data)

    def close(self) -> None:
        """Call at the end of the body.

        Raises:
            StreamInterruptedError: `[DONE]` never came.
        """
        if not self.is_done:
            raise StreamInterruptedError("the stream ended before its closing event; the answer is not complete")

    def _parse(self, data: str) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except ValueError as exc:
            raise APIResponseError(f"an event of the stream is not JSON: {data[:200]!r}") from exc
        if not isinstance(value, dict):
            raise APIResponseError(f"an event of the stream is not an object: {data[:200]!r}")
        if value.get("error") is not None:
            raise stream_error(value, request_id=self._request_id)
        return value
