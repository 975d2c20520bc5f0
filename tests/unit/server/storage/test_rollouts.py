"""Rollouts in the database: exact, once each, in order, filtered."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_server.storage.database import Database
from trimtab_server.storage.rollouts import SqlRolloutReader, decode_cursor, encode_cursor, insert_rollouts

pytestmark = pytest.mark.anyio

MakeRollout = Callable[..., Rollout]


def insert(database: Database, *rollouts: Rollout) -> None:
    with database.writing() as connection:
        insert_rollouts(database, connection, rollouts)


async def ids(database: Database, **where: Any) -> list[str]:
    return [rollout.id async for rollout in SqlRolloutReader(database).read(RolloutFilter(**where))]


async def read_one(database: Database) -> Rollout:
    [rollout] = [rollout async for rollout in SqlRolloutReader(database).read(RolloutFilter())]
    return rollout


async def test_a_rollout_comes_back_exactly(database: Database, make_rollout: MakeRollout) -> None:
    rollout = make_rollout(
        base_logprobs=[-0.1, -1e-300], adapter_logprobs=[[0.1, 0.2], [-9999.0, 1 / 3]], created_at=1700000000.123456
    )
    insert(database, rollout)
    assert await read_one(database) == rollout


async def test_tokens_at_which_an_adapter_did_not_run_stay_none_and_a_nan_stays_a_nan(
    database: Database, make_rollout: MakeRollout
) -> None:
    insert(
        database, make_rollout(adapter_logprobs=[[None, -0.5, None], [0.0, float("nan"), float("-inf")], [None], []])
    )
    first, (zero, nan, infinite), *rest = (await read_one(database)).adapter_logprobs or []
    assert (first, zero, infinite, rest) == ([None, -0.5, None], 0.0, float("-inf"), [[None], []])
    assert nan != nan


async def test_what_was_not_recorded_stays_absent_and_not_empty(database: Database, make_rollout: MakeRollout) -> None:
    rollout = make_rollout(
        prompt=None,
        steering=[],
        base_logprobs=None,
        adapter_logprobs=None,
        steered_logprobs=[],
        kl=None,
        flipped=None,
        finish_reason=None,
        rewards=[],
        output_text="",
        output_token_ids=[],
    )
    insert(database, rollout)
    assert await read_one(database) == rollout


@pytest.mark.parametrize(
    "text", ["nul \x00 inside", "lone \ud83d half", "\x01 leading", "\x01", "", "né\u2028\U0001f600"]
)
async def test_any_sampled_text_comes_back(database: Database, make_rollout: MakeRollout, text: str) -> None:
    insert(database, make_rollout(output_text=text, prompt=text, sampling={"stop": text}, metadata={text: text}))
    found = await read_one(database)
    assert (found.output_text, found.prompt, found.sampling, found.metadata) == (
        text,
        text,
        {"stop": text},
        {text: text},
    )


async def test_numbers_that_are_not_finite_come_back(database: Database, make_rollout: MakeRollout) -> None:
    insert(database, make_rollout(base_logprobs=[-math.inf, math.nan], metadata={"x": math.nan}))
    found = await read_one(database)
    assert found.base_logprobs is not None
    assert found.base_logprobs[0] == -math.inf
    assert math.isnan(found.base_logprobs[1])
    assert math.isnan(found.metadata["x"])


async def test_writing_an_id_again_changes_nothing(database: Database, make_rollout: MakeRollout) -> None:
    insert(database, make_rollout("a"), make_rollout("a", output_text="second"))
    insert(database, make_rollout("a", output_text="third"), make_rollout("b"))
    assert await ids(database) == ["a", "b"]
    found = [rollout async for rollout in SqlRolloutReader(database).read(RolloutFilter())]
    assert found[0].output_text == "good"


async def test_reading_goes_by_time_and_then_by_id(database: Database, make_rollout: MakeRollout) -> None:
    insert(database, make_rollout("c", 1.0), make_rollout("b", 2.0), make_rollout("a", 2.0), make_rollout("d", 0.5))
    assert await ids(database) == ["d", "c", "a", "b"]


async def test_filters_select(database: Database, make_rollout: MakeRollout) -> None:
    calm = AdapterWeight(name="calm", version="b" * 16, alpha=-0.5)
    kind = AdapterWeight(name="kind", version="a" * 16, alpha=1.0)
    insert(
        database,
        make_rollout("1", 1.0),
        make_rollout("2", 2.0, route="calm", steering=[kind, calm], chosen=False),
        make_rollout("3", 3.0, endpoint="reference", steering=[]),
    )
    assert await ids(database, route="calm") == ["2"]
    assert await ids(database, adapter="kind") == ["1", "2"]
    assert await ids(database, version="b" * 16) == ["2"]
    assert await ids(database, adapter="kind", version="b" * 16) == []  # both must hold of one term
    assert await ids(database, endpoint="reference") == ["3"]
    assert await ids(database, since=2.0) == ["2", "3"]
    assert await ids(database, until=2.0) == ["1"]
    assert await ids(database, chosen_only=True) == ["1", "3"]
    assert await ids(database, limit=2) == ["1", "2"]
    assert await ids(database, limit=0) == []


async def test_reading_goes_on_over_many_batches(
    database: Database, make_rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab_server.storage.rollouts._BATCH", 3)
    expected = [f"{number:02}" for number in range(10)]
    insert(database, *(make_rollout(name, float(number // 4)) for number, name in enumerate(expected)))
    assert await ids(database) == expected
    assert await ids(database, limit=7) == expected[:7]
    assert await ids(database, limit=6) == expected[:6]


async def test_pages_follow_one_another(database: Database, make_rollout: MakeRollout) -> None:
    insert(database, *(make_rollout(f"{number}", 1.0) for number in range(5)))
    reader, found, cursor = SqlRolloutReader(database), [], None
    for size in (2, 2, 1):
        page = await reader.page(RolloutFilter(), size=2, cursor=cursor)
        assert len(page.rollouts) == size
        found += [rollout.id for rollout in page.rollouts]
        cursor = page.cursor
    assert (found, cursor) == (["0", "1", "2", "3", "4"], None)


async def test_the_last_full_page_has_no_cursor(database: Database, make_rollout: MakeRollout) -> None:
    insert(database, make_rollout("1"), make_rollout("2"))
    assert (await SqlRolloutReader(database).page(RolloutFilter(), size=2)).cursor is None


def test_a_cursor_is_decoded_to_what_it_was_made_of() -> None:
    assert decode_cursor(encode_cursor(1.5, "é-1")) == (1.5, "é-1")


@pytest.mark.parametrize("cursor", ["x", "!!!!", "bnVsbA", "WzEsMl0", "é", encode_cursor(1.0, "\x00")])
def test_a_made_up_cursor_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidRequestError, match="cursor"):
        decode_cursor(cursor)
