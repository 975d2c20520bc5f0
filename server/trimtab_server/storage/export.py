"""The rollout log as a file: JSON Lines or Parquet, made and sent piece by piece.

JSON Lines has one `Rollout` per line as `contract.records` defines it; numbers that are not finite are written `NaN`,
`Infinity` and `-Infinity`, as Python's `json` does. Parquet has the same fields as columns; `sampling` and `metadata`
are JSON texts there, because their fields vary.
"""

import json
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

import anyio.to_thread
import pyarrow as pa
import pyarrow.parquet as pq

from trimtab_adapters.contract.errors import StorageError
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_server.storage.base import RolloutReader

ExportFormat = Literal["jsonl", "parquet"]

MEDIA_TYPES: dict[ExportFormat, str] = {
    "jsonl": "application/jsonl",
    "parquet": "application/vnd.apache.parquet",
}
_ROW_GROUP = 4096
_LINES_PER_CHUNK = 64


def parquet_schema() -> Any:
    """The columns of a Parquet export, a `pyarrow.Schema`."""
    doubles, weight = pa.list_(pa.float64()), [("name", pa.string()), ("version", pa.string()), ("alpha", pa.float64())]
    reward = [
        ("name", pa.string()),
        ("version", pa.string()),
        ("raw", pa.float64()),
        ("calibrated", pa.float64()),
        ("calibration_size", pa.int64()),
        ("calibration_error", pa.float64()),
        ("calibration_method", pa.string()),
        ("calibration_stale", pa.bool_()),
    ]
    said = [
        ("rating", pa.float64()),
        ("comment", pa.string()),
        ("preferred_index", pa.int32()),
        ("user", pa.string()),
        ("created_at", pa.float64()),
        ("updated_at", pa.float64()),
    ]
    mix = [*reward, ("parts", pa.list_(pa.struct(reward)))]
    fields = [
        pa.field("schema_version", pa.int32(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("created_at", pa.float64(), nullable=False),
        pa.field("duration_s", pa.float64(), nullable=False),
        pa.field("route", pa.string(), nullable=False),
        pa.field("base_model", pa.string(), nullable=False),
        pa.field("endpoint", pa.string(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("output_text", pa.string(), nullable=False),
        pa.field("output_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("steering", pa.list_(pa.struct(weight)), nullable=False),
        pa.field("base_logprobs", doubles),
        pa.field("adapter_logprobs", pa.list_(doubles)),
        pa.field("steered_logprobs", doubles),
        pa.field("kl", doubles),
        pa.field("flipped", pa.list_(pa.bool_())),
        pa.field("sampling", pa.string(), nullable=False),
        pa.field("candidate_index", pa.int32(), nullable=False),
        pa.field("num_candidates", pa.int32(), nullable=False),
        pa.field("chosen", pa.bool_(), nullable=False),
        pa.field("choice_index", pa.int32()),
        pa.field("finish_reason", pa.string()),
        pa.field("rewards", pa.list_(pa.struct(mix)), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("feedback", pa.list_(pa.struct(said)), nullable=False),
    ]
    return pa.schema(fields)


async def export_chunks(
    reader: RolloutReader, where: RolloutFilter, export_format: ExportFormat, *, row_group: int = _ROW_GROUP
) -> AsyncIterator[bytes]:
    """The bytes of an export, in pieces of one row group (Parquet) or some lines (JSON Lines).

    Raises:
        StorageError: The log could not be read; what came before is an incomplete file.
    """
    if export_format == "jsonl":
        lines: list[bytes] = []
        async for rollout in reader.read(where):
            lines.append(json.dumps(rollout.model_dump(), separators=(",", ":")).encode() + b"\n")
            if len(lines) == _LINES_PER_CHUNK:
                yield b"".join(lines)
                lines.clear()
        yield b"".join(lines)
        return
    sink = _ChunkSink()
    schema = parquet_schema()
    writer = pq.ParquetWriter(sink, schema, compression="zstd")
    batch: list[Rollout] = []
    async for rollout in reader.read(where):
        batch.append(rollout)
        if len(batch) == row_group:
            await anyio.to_thread.run_sync(_write_group, writer, schema, batch)
            batch = []
            yield sink.drain()
    if batch:
        await anyio.to_thread.run_sync(_write_group, writer, schema, batch)
    writer.close()
    yield sink.drain()


async def export_file(
    reader: RolloutReader, where: RolloutFilter, path: Path, export_format: ExportFormat, *, row_group: int = _ROW_GROUP
) -> int:
    """Write an export to a file, which appears under its name only when it is complete; returns its size in bytes.

    Raises:
        StorageError: The log could not be read or the file not be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    size_bytes = 0
    try:
        with temporary.open("xb") as file:
            async for chunk in export_chunks(reader, where, export_format, row_group=row_group):
                size_bytes += len(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as exc:
        raise StorageError(f"{path} cannot be written: {exc.strerror}") from exc
    finally:
        temporary.unlink(missing_ok=True)
    return size_bytes


def _write_group(writer: Any, schema: Any, batch: Sequence[Rollout]) -> None:
    rows = [rollout.model_dump() for rollout in batch]
    columns = {name: [_cell(row[name]) for row in rows] for name in schema.names}
    for name in ("sampling", "metadata"):
        columns[name] = [json.dumps(row[name], separators=(",", ":")) for row in rows]
    writer.write_table(pa.Table.from_pydict(columns, schema=schema), row_group_size=len(rows))


def _cell(value: Any) -> Any:
    """Parquet's texts are UTF-8, which has no lone surrogates; they become U+FFFD as in any decoder."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


class _ChunkSink:
    """A file for Parquet's writer whose content is taken out as it grows."""

    def __init__(self) -> None:
        self.closed = False
        self._position = 0
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        """Append."""
        part = bytes(data)
        self._parts.append(part)
        self._position += len(part)
        return len(part)

    def tell(self) -> int:
        """Bytes written so far, taken out or not."""
        return self._position

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """No more is written; what is there can still be taken."""
        self.closed = True

    def drain(self) -> bytes:
        """Take out what has been written since the last call."""
        parts, self._parts = self._parts, []
        return b"".join(parts)
