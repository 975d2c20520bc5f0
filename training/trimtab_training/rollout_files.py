"""Rollouts in files that `trimtab rollouts export` wrote, so that a run needs no gateway."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from trimtab_adapters.contract.errors import IntegrityError, InvalidRequestError
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.rollout_filter import RolloutFilter, select_rollouts

_ROWS_PER_BATCH = 1024


def read_rollout_files(paths: Sequence[Path], where: RolloutFilter) -> list[Rollout]:
    """The rollouts of the files that `where` selects, in the order of the files; each id once.

    Raises:
        InvalidRequestError: A file cannot be read.
        IntegrityError: A file holds something else than rollouts.
    """
    found: dict[str, Rollout] = {}
    for path in paths:
        for rollout in _read(path):
            if where.matches_origin(rollout):
                found.setdefault(rollout.id, rollout)
    return select_rollouts(found.values(), where)


def _read(path: Path) -> Iterator[Rollout]:
    try:
        yield from (_parquet(path) if path.suffix == ".parquet" else _json_lines(path))
    except OSError as exc:
        raise InvalidRequestError(f"the rollouts in {path} cannot be read: {exc.strerror or exc}") from exc
    except ValidationError as exc:  # without what was said there: a log holds everything
        field = ".".join(str(part) for part in exc.errors()[0]["loc"])
        raise IntegrityError(f"{path} is no file of rollouts: {field}: {exc.errors()[0]['msg']}") from exc
    except (pa.ArrowException, ValueError) as exc:
        raise IntegrityError(f"{path} is no file of rollouts: {exc}") from exc


def _json_lines(path: Path) -> Iterator[Rollout]:
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                # Not by pydantic's own JSON, which refuses lone surrogates.
                yield Rollout.model_validate(json.loads(line))


def _parquet(path: Path) -> Iterator[Rollout]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_PER_BATCH):
            yield from map(_of_row, batch.to_pylist())


def _of_row(row: dict[str, Any]) -> Rollout:
    """Fields whose own fields vary are JSON texts in a table."""
    if not {"sampling", "metadata"} <= row.keys():
        raise ValueError("it lacks columns of an export")
    varying = {name: json.loads(row[name]) for name in ("sampling", "metadata")}
    return Rollout.model_validate({**row, **varying})
