import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab_adapters.contract.errors import IntegrityError, InvalidRequestError
from trimtab_adapters.contract.feedback import Feedback
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_server.storage.export import ExportFormat, export_file
from trimtab_training.logged_config import LoggedConfig
from trimtab_training.logged_rollouts import read_logged
from trimtab_training.rollout_files import read_rollout_files

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Log:
    """What the gateway's export reads."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.rollouts = rollouts

    async def read(self, where: RolloutFilter) -> AsyncIterator[Rollout]:
        for rollout in self.rollouts:
            yield rollout


def rollout(index: int, **fields: Any) -> Rollout:
    part = RewardValue(name="kind", version="1", raw=0.5, calibrated=0.25, calibration_size=8)
    data: dict[str, Any] = {
        "id": f"r{index}",
        "request_id": f"q{index // 2}",
        "created_at": index / 8,
        "duration_s": 0.5,
        "route": "nice",
        "base_model": "base",
        "endpoint": "completions",
        "prompt": "Say \u2028 \U0001f600",
        "prompt_token_ids": [5, 6],
        "output_text": "good\n",
        "output_token_ids": [1, 2],
        "steering": [AdapterWeight(name="kind", version="a" * 16, alpha=-0.5)],
        "base_logprobs": [-0.1, float("-inf")],
        "adapter_logprobs": [[None, -0.5]],
        "steered_logprobs": [-0.25, -1.0],
        "kl": [0.0, 0.5],
        "flipped": [True, False],
        "sampling": {"temperature": 0.5, "logit_bias": {"3": 1.0}, "stop": ["."]},
        "candidate_index": index % 2,
        "num_candidates": 2,
        "choice_index": index % 2,
        "finish_reason": "stop",
        "rewards": [part.model_copy(update={"name": "mix", "parts": [part]})],
        "metadata": {"prompt_index": 0, "nested": {"a": [1, None]}},
        "feedback": [
            Feedback(rating=-0.5, comment="\x00", preferred_index=1, user="ann", created_at=1.0, updated_at=2.0)
        ],
    }
    return Rollout.model_validate({**data, **fields})


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
async def test_what_the_gateway_exports_is_read_back_exactly(tmp_path: Path, kind: ExportFormat) -> None:
    bare = dict.fromkeys(
        ("prompt", "base_logprobs", "adapter_logprobs", "steered_logprobs", "kl", "flipped", "choice_index")
    )
    rollouts = [rollout(0), rollout(1, **bare, steering=[], rewards=[], feedback=[], finish_reason=None, sampling={})]
    path = tmp_path / f"log.{kind}"
    await export_file(Log(rollouts), RolloutFilter(), path, kind, row_group=1)
    assert read_rollout_files([path], RolloutFilter()) == rollouts


async def test_a_run_reads_files_in_their_order_each_rollout_once_and_needs_no_gateway(tmp_path: Path) -> None:
    rollouts = [rollout(index) for index in range(6)]
    first, second = tmp_path / "a.parquet", tmp_path / "b.jsonl"
    await export_file(Log(rollouts[:4]), RolloutFilter(), first, "parquet")
    await export_file(Log(rollouts[2:]), RolloutFilter(), second, "jsonl")
    both = LoggedConfig(path=(first, second))
    assert read_logged(both, None) == rollouts
    assert read_logged(both.model_copy(update={"limit": 3}), None) == rollouts[:3]
    assert read_logged(both.model_copy(update={"since": 0.25, "until": 0.5}), None) == rollouts[2:4]
    assert read_logged(both.model_copy(update={"enabled": False}), None) == []
    assert LoggedConfig.model_validate({"path": str(first)}).path == (first,)


async def test_conditions_on_outcomes_choose_requests_in_files_too(tmp_path: Path) -> None:
    rollouts = [rollout(index, feedback=[]) for index in range(4)]
    rollouts[1] = rollout(1)
    path = tmp_path / "a.jsonl"
    await export_file(Log(rollouts), RolloutFilter(), path, "jsonl")
    config = LoggedConfig(path=(path,), max_rating=-0.5)
    assert [r.id for r in read_logged(config, None)] == ["r0", "r1"]
    assert [r.id for r in read_logged(config.model_copy(update={"whole_requests": False}), None)] == ["r1"]


async def test_a_text_that_is_half_a_character_is_read(tmp_path: Path) -> None:
    await export_file(Log([rollout(0, output_text="half \ud83d")]), RolloutFilter(), tmp_path / "a.jsonl", "jsonl")
    (read,) = read_rollout_files([tmp_path / "a.jsonl"], RolloutFilter())
    assert read.output_text == "half \ud83d"


async def test_files_that_hold_something_else_are_refused_without_telling_what(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({**rollout(0).model_dump(), "output_token_ids": "secret words"}) + "\n")
    with pytest.raises(IntegrityError, match="output_token_ids") as error:
        read_rollout_files([bad], RolloutFilter())
    assert "secret" not in error.value.message
    bad.write_text("{")
    with pytest.raises(IntegrityError, match="no file of rollouts"):
        read_rollout_files([bad], RolloutFilter())
    table = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"id": ["a"]}), table)
    with pytest.raises(IntegrityError, match="lacks columns"):
        read_rollout_files([table], RolloutFilter())
    table.write_bytes(b"no table at all")
    with pytest.raises(IntegrityError, match="no file of rollouts"):
        read_rollout_files([table], RolloutFilter())
    for missing in ("none.parquet", "none.jsonl"):
        with pytest.raises(InvalidRequestError, match="cannot be read"):
            read_rollout_files([tmp_path / missing], RolloutFilter())
