"""Exports: every field, in pieces, and never half a file under its name."""

import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from trimtab_adapters.contract.errors import StorageError
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_server.storage.export import export_chunks, export_file, parquet_schema

pytestmark = pytest.mark.anyio

MakeRollout = Callable[..., Rollout]


class ListReader:
    """A `RolloutReader` over a list; fails at its end on demand."""

    def __init__(self, *rollouts: Rollout, fails: bool = False) -> None:
        self.rollouts = rollouts
        self.fails = fails

    async def read(self, where: RolloutFilter) -> AsyncIterator[Rollout]:
        for rollout in self.rollouts[: where.limit]:
            yield rollout
        if self.fails:
            raise StorageError("the database is away")


async def test_json_lines_hold_exactly_the_rollouts(tmp_path: Path, make_rollout: MakeRollout) -> None:
    rollouts = [
        make_rollout("a", base_logprobs=[float("-inf"), 0.1]),
        make_rollout("b", output_text="line\nfeed \u2028 \ud83d", steering=[], kl=None),
    ]
    path = tmp_path / "out.jsonl"
    size_bytes = await export_file(ListReader(*rollouts), RolloutFilter(), path, "jsonl")
    lines = path.read_bytes().splitlines()
    assert [Rollout.model_validate(json.loads(line)) for line in lines] == rollouts
    assert Rollout.model_validate_json(lines[0]) == rollouts[0]
    assert size_bytes == path.stat().st_size


def from_parquet(row: dict[str, Any]) -> Rollout:
    return Rollout.model_validate(
        {**row, "sampling": json.loads(row["sampling"]), "metadata": json.loads(row["metadata"])}
    )


async def test_parquet_holds_every_field(tmp_path: Path, make_rollout: MakeRollout) -> None:
    part = RewardValue(name="a", version="1", raw=0.5, calibrated=0.75, calibration_method="pooled")
    mix = part.model_copy(update={"name": "mix", "parts": [part, part], "calibration_stale": True})
    rollouts = [
        make_rollout("a"),
        make_rollout("c", adapter_logprobs=[[None, -0.5], [None, None]]),
        make_rollout("mix", rewards=[mix]),
        make_rollout(
            "b",
            prompt=None,
            steering=[],
            base_logprobs=None,
            adapter_logprobs=None,
            steered_logprobs=None,
            kl=None,
            flipped=None,
            finish_reason=None,
            rewards=[],
        ),
    ]
    path = tmp_path / "out.parquet"
    await export_file(ListReader(*rollouts), RolloutFilter(), path, "parquet")
    table = pq.read_table(path)
    assert [from_parquet(row) for row in table.to_pylist()] == rollouts
    assert table.schema.names == list(Rollout.model_fields)
    assert str(table.schema.field("adapter_logprobs").type) == "list<element: list<element: double>>"


async def test_the_columns_are_the_fields_of_a_rollout() -> None:
    assert parquet_schema().names == list(Rollout.model_fields)


async def test_parquet_is_sent_row_group_by_row_group(make_rollout: MakeRollout) -> None:
    reader = ListReader(*(make_rollout(f"{number}") for number in range(5)))
    chunks = [chunk async for chunk in export_chunks(reader, RolloutFilter(), "parquet", row_group=2)]
    assert len(chunks) == 3
    assert all(chunks)
    file = pq.ParquetFile(io.BytesIO(b"".join(chunks)))
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [2, 2, 1]


async def test_an_empty_log_gives_a_valid_file(tmp_path: Path) -> None:
    await export_file(ListReader(), RolloutFilter(), tmp_path / "out.parquet", "parquet")
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0
    assert await export_file(ListReader(), RolloutFilter(), tmp_path / "out.jsonl", "jsonl") == 0


async def test_a_lone_surrogate_becomes_the_replacement_character_in_parquet(
    tmp_path: Path, make_rollout: MakeRollout
) -> None:
    reader = ListReader(make_rollout("a", output_text="x\ud83dy", prompt="\ufeff\U0001f600"))
    await export_file(reader, RolloutFilter(), tmp_path / "out.parquet", "parquet")
    [row] = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert (row["output_text"], row["prompt"]) == ("x\ufffdy", "\ufeff\U0001f600")


async def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path: Path, make_rollout: MakeRollout) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(StorageError, match="away"):
        await export_file(ListReader(make_rollout("a"), fails=True), RolloutFilter(), path, "jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    assert path.read_text() == "old"
    with pytest.raises(StorageError, match="cannot be written"):
        await export_file(ListReader(), RolloutFilter(), tmp_path / "nowhere" / "out.jsonl", "jsonl")
