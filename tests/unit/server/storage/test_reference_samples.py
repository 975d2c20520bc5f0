"""Samples of reference policies in the rollout log."""

from collections.abc import Callable
from typing import Any

import pytest

from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_adapters.contract.reference_policy import ReferencePolicy
from trimtab_adapters.contract.rollout_filter import RolloutFilter
from trimtab_server.storage.database import Database
from trimtab_server.storage.identified_log import IdentifiedRolloutLog
from trimtab_server.storage.reference_samples import SqlSampleLog
from trimtab_server.storage.rollouts import SqlRolloutReader, insert_rollouts

pytestmark = pytest.mark.anyio

SAMPLING = {"temperature": 1.0, "max_tokens": 4}
POLICY = ReferencePolicy.of("base", "completions", SAMPLING)
MakeRollout = Callable[..., Rollout]
Candidates = Callable[..., list[Rollout]]


@pytest.fixture
def candidates(make_rollout: MakeRollout) -> Candidates:
    """All candidates of an unsteered request, the chosen one first as they are logged."""

    def make(request: str, texts: list[str], *, created_at: float = 1.0, **changes: Any) -> list[Rollout]:
        plain: dict[str, Any] = {"steering": [], "kl": None, "flipped": None, "adapter_logprobs": None, "rewards": []}
        rollouts = [
            make_rollout(
                f"{request}-0-{i}",
                created_at,
                **{
                    **plain,
                    "request_id": request,
                    "sampling": SAMPLING,
                    "output_text": text,
                    "candidate_index": i,
                    "num_candidates": len(texts),
                    "chosen": i == len(texts) - 1,
                    **changes,
                },
            )
            for i, text in enumerate(texts)
        ]
        return rollouts[::-1]

    return make


def log(database: Database, *batches: list[Rollout]) -> SqlSampleLog:
    with database.writing() as connection:
        insert_rollouts(database, connection, [rollout for batch in batches for rollout in batch])
    return SqlSampleLog(database)


async def texts_of(samples: SqlSampleLog, *, policy: ReferencePolicy = POLICY, limit: int = 99) -> list[str]:
    return [sample.output_text for sample in await samples.of_prompt(policy.key, [5, 6], limit=limit)]


async def test_all_candidates_of_a_request_are_samples_chosen_or_not(
    database: Database, candidates: Candidates
) -> None:
    value = RewardValue(name="kind", version="1", raw=0.5, calibrated=0.75, parts=None)
    samples = log(database, candidates("a", ["one", "two", "three"], rewards=[value]))
    found = await samples.of_prompt(POLICY.key, [5, 6], limit=99)
    assert [sample.output_text for sample in found] == ["one", "two", "three"]
    assert found[0].rewards == (value,)
    assert (found[0].prompt, found[0].prompt_token_ids) == ("Say", (5, 6))


async def test_a_request_of_which_only_some_candidates_are_there_is_left_out(
    database: Database, candidates: Candidates
) -> None:
    whole, part = candidates("a", ["one", "two"]), candidates("b", ["best", "worse", "worst"])
    samples = log(database, whole, part[:2])
    assert await texts_of(samples) == ["one", "two"]
    log(database, part[2:])
    assert await texts_of(samples) == ["one", "two", "best", "worse", "worst"]


async def test_the_newest_requests_come_first_up_to_the_limit(database: Database, candidates: Candidates) -> None:
    samples = log(
        database, candidates("a", ["old", "older"], created_at=1.0), candidates("b", ["new", "newer"], created_at=2.0)
    )
    assert await texts_of(samples, limit=3) == ["new", "newer", "old"]


async def test_reference_rollouts_and_candidates_are_both_samples(database: Database, candidates: Candidates) -> None:
    metadata = {"prompt_index": 0, "endpoint": "completions"}
    drawn = candidates("steered", ["drawn"], endpoint="reference", metadata=metadata)
    samples = log(database, drawn, candidates("plain", ["plain"], created_at=2.0))
    assert await texts_of(samples) == ["plain", "drawn"]


async def test_what_is_no_sample_of_the_policy_is_not_found(database: Database, candidates: Candidates) -> None:
    weight = AdapterWeight(name="kind", version="a" * 16, alpha=1.0)
    samples = log(
        database,
        candidates("steered", ["steered"], steering=[weight]),
        candidates("seeded", ["seeded"], sampling={**SAMPLING, "seed": 3}),
        candidates("hot", ["hot"], sampling={**SAMPLING, "temperature": 2.0}),
        candidates("other base", ["other base"], base_model="other"),
        candidates("other prompt", ["other prompt"], prompt_token_ids=[5, 7]),
        candidates("chat", ["chat"], endpoint="chat.completions"),
        candidates("identified", ["identified"], metadata={"prompt_index": 0, "base_identity": "b#1"}),
    )
    assert await texts_of(samples) == []
    assert await texts_of(samples, policy=POLICY.identified("b#1")) == ["identified"]


async def test_two_prompts_of_one_request_are_told_apart(database: Database, candidates: Candidates) -> None:
    # Both have two candidates; of the second prompt, which has the same ids, only one has arrived.
    first = candidates("a", ["one", "two"], metadata={"prompt_index": 0})
    second = candidates("a", ["three", "four"], metadata={"prompt_index": 1})
    second = [rollout.model_copy(update={"id": f"second-{rollout.id}"}) for rollout in second]
    assert await texts_of(log(database, first, second[:1])) == ["one", "two"]


async def test_the_policy_with_the_most_samples_of_the_present_base_is_found(
    database: Database, candidates: Candidates
) -> None:
    now = {"prompt_index": 0, "base_identity": "now"}
    samples = log(
        database,
        candidates("few", ["x"] * 2, metadata=now),
        candidates("more", ["x"] * 3, sampling={"temperature": 2.0}, metadata=now),
        candidates("gone", ["x"] * 5, metadata={"prompt_index": 0, "base_identity": "gone"}),
        candidates("other base", ["x"] * 6, base_model="other", metadata=now),
    )
    found = await samples.most_sampled("base", "now")
    assert found == ReferencePolicy.of("base", "completions", {"temperature": 2.0}, identity="now")
    assert await samples.most_sampled("base", "never") is None
    assert len(await samples.of_policy(found.key, limit=99)) == 3


async def test_readers_of_the_log_see_nothing_of_this(database: Database, candidates: Candidates) -> None:
    (rollout,) = candidates("a", ["one"])
    log(database, [rollout])
    assert [found async for found in SqlRolloutReader(database).read(RolloutFilter())] == [rollout]


async def test_the_log_writes_down_which_base_it_was(candidates: Candidates) -> None:
    class Kept:
        def __init__(self) -> None:
            self.rollouts: list[Rollout] = []

        async def append(self, rollouts: Any) -> None:
            self.rollouts += rollouts

    kept, told = Kept(), [None, "b#1"]
    log = IdentifiedRolloutLog(kept, lambda: told.pop(0))
    (rollout,) = candidates("a", ["one"])
    await log.append([rollout])
    await log.append([rollout])
    assert kept.rollouts[0] == rollout
    assert kept.rollouts[1].metadata == {**rollout.metadata, "base_identity": "b#1"}
    assert ReferencePolicy.of_rollout(kept.rollouts[1]) == POLICY.identified("b#1")
