import logging
from typing import Any

import pytest

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.feedback import Feedback
from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_training.gateway import ScoreReply
from trimtab_training.logged_config import LoggedConfig
from trimtab_training.logged_rewards import samples_of, score_logged
from trimtab_training.logged_rollouts import REASONS, RolloutSieve, read_logged, same_draw, same_output
from trimtab_training.models import Vocabulary
from trimtab_training.prompts import Prompt, prompts_of


def rollout(index: int, output: tuple[int, ...] = (7, 8), **fields: Any) -> Rollout:
    return Rollout.model_validate(
        {
            "id": f"r{index}",
            "request_id": f"q{index}",
            "created_at": float(index),
            "duration_s": 0.0,
            "route": "r",
            "base_model": "b",
            "endpoint": "completions",
            "prompt": "t1",
            "prompt_token_ids": [1],
            "output_text": " ".join(f"t{token}" for token in output),
            "output_token_ids": list(output),
            "steering": [],
            "finish_reason": "stop",
            **fields,
        }
    )


def group(request: str, num: int, prompt_index: int = 0, **fields: Any) -> list[Rollout]:
    """All candidates of one prompt of one request, the last one chosen and logged first."""
    return [
        rollout(
            0,
            (index + 1,),
            **{
                "id": f"{request}-{prompt_index}-{'ref-' if 'endpoint' in fields else ''}{index}",
                "request_id": request,
                "candidate_index": index,
                "num_candidates": num,
                "chosen": index == num - 1,
                "metadata": {"prompt_index": prompt_index},
                **fields,
            },
        )
        for index in reversed(range(num))
    ]


def test_the_gateway_selects_and_is_told_nothing_that_does_not_restrict(gateway: Any) -> None:
    gateway.rollouts = [rollout(index).model_dump_json() for index in range(5)]
    with gateway.client() as client:
        assert len(read_logged(LoggedConfig(), client)) == 5
        found = read_logged(LoggedConfig(route="r", since=1.5, limit=2, with_operators=True), client)
        read_logged(LoggedConfig(has_feedback=True, reward="lucky", min_calibrated=0.5), client)
        assert read_logged(LoggedConfig(enabled=False), client) == []
    assert [r.id for r in found] == ["r2", "r3"]
    assert gateway.bodies("/admin/rollouts/export") == [
        {"format": "jsonl"},
        {"format": "jsonl", "route": "r", "since": "1.5", "limit": "2"},
        {
            "format": "jsonl",
            "whole_requests": "true",
            "has_feedback": "true",
            "reward": "lucky",
            "min_calibrated": "0.5",
        },
    ]
    with pytest.raises(InvalidRequestError, match=r"logged\.path"):
        read_logged(LoggedConfig(), None)


def test_all_candidates_of_a_request_are_kept_or_none() -> None:
    """The winner of a best-of-4 alone says more about the choice than about the policy."""
    winner = [r for r in group("winner", 4) if r.chosen]
    cut_off_by_the_limit = group("cut", 4)[:3]
    whole = [*group("two prompts", 2, 0), *group("two prompts", 2, 1)]
    one_prompt_short = [*group("short", 2, 0), *group("short", 2, 1)[:1]]
    twice = [*group("twice", 2)[:1], *group("twice", 2)[:1]]
    sieve = RolloutSieve([*winner, *cut_off_by_the_limit, *whole, *one_prompt_short, *twice])
    sieve.leave_out_incomplete()
    assert [r.id for r in sieve.rollouts] == [
        *("two prompts-0-1", "two prompts-0-0", "two prompts-1-1", "two prompts-1-0"),
        *("short-0-1", "short-0-0"),
    ]
    assert sieve.left_out == {"partial_request": 1 + 3 + 1 + 2}
    assert sieve.figures() == {"num_read": 13.0, "num_used": 6.0, "left_out/partial_request": 7.0}


def test_references_of_a_request_are_counted_apart_from_its_candidates() -> None:
    references = group("q", 3, endpoint="reference")
    sieve = RolloutSieve([*references, *group("q", 2)[:1]])
    sieve.leave_out_incomplete()
    assert sieve.rollouts == references


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"finish_reason": None}, "broken_off"),
        ({"finish_reason": "abort"}, "broken_off"),
        ({"metadata": {"prompt_index": 0, "num_left_out": 1}}, "broken_off"),
        ({"output_token_ids": []}, "empty"),
        ({"prompt_token_ids": []}, "empty"),
    ],
)
def test_one_candidate_that_cannot_be_used_takes_its_request_with_it(change: dict[str, Any], reason: str) -> None:
    first, second = group("bad", 2)
    kept = group("good", 2)
    sieve = RolloutSieve([first, second.model_copy(update=change), *kept])
    sieve.leave_out_incomplete()
    assert sieve.rollouts == kept
    assert sieve.left_out == {reason: 2}


def test_a_pool_takes_the_same_output_once_with_all_that_was_said_of_it() -> None:
    def said(rating: float) -> list[Feedback]:
        return [Feedback(rating=rating, created_at=0.0, updated_at=0.0)]

    rewards = [RewardValue(name="r", version=version, raw=0.5) for version in ("1", "2")]
    sieve = RolloutSieve(
        [
            rollout(0, rewards=rewards[:1], feedback=said(1.0)),
            rollout(1, (7,)),
            rollout(2, rewards=rewards[1:], feedback=said(-0.5)),
            rollout(3, prompt_token_ids=[2]),
        ]
    )
    sieve.leave_out_repeats(same_output)
    assert [r.id for r in sieve.rollouts] == ["r0", "r1", "r3"]
    assert (sieve.rollouts[0].rewards, sieve.rollouts[0].rating) == (rewards, 0.25)
    assert sieve.left_out == {"repeated": 1}


def test_equal_samples_are_one_draw_only_when_a_seed_says_so() -> None:
    kind = [AdapterWeight(name="kind", version="a" * 16, alpha=1.0)]
    rollouts = [
        rollout(0),
        rollout(1),  # equal by chance: both count
        rollout(2, sampling={"seed": 3}),
        rollout(3, sampling={"seed": 3}),  # the same draw
        rollout(4, sampling={"seed": 4}),
        rollout(5, sampling={"seed": 3}, steering=kind),  # of another policy
    ]
    sieve = RolloutSieve(rollouts)
    sieve.leave_out_repeats(same_draw)
    assert [r.id for r in sieve.rollouts] == ["r0", "r1", "r2", "r4", "r5"]


def test_what_is_left_out_is_told_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sieve = RolloutSieve([rollout(index) for index in range(len(REASONS) + 2)])
    reasons = iter([*REASONS, "sampling_top_p", None])
    sieve.leave_out(lambda r: next(reasons))
    sieve.report()
    assert f"1 of {len(REASONS) + 2} logged rollouts are learned from" in caplog.text
    for words in (*REASONS.values(), "another top_p"):
        assert words in caplog.text


def test_prompts_of_the_log_are_distinct_and_decoded_where_ids_were_sent(vocabulary: Vocabulary) -> None:
    rollouts = [rollout(0), rollout(1), rollout(2, prompt=None, prompt_token_ids=[4, 5])]
    assert prompts_of(rollouts, vocabulary) == [Prompt("t1", (1,)), Prompt("t4 t5", (4, 5))]


def test_samples_have_logprobs_only_where_these_are_of_what_was_drawn_from(vocabulary: Vocabulary) -> None:
    logprobs: dict[str, Any] = {"steered_logprobs": [-0.5, -0.25], "base_logprobs": [-1.0, -2.0]}
    rollouts = [rollout(0, **logprobs), rollout(1, sampling={"top_p": 0.5}, **logprobs), rollout(2)]
    fair, cut, unknown = samples_of(rollouts, vocabulary, {})
    assert (fair.steered_logprobs, fair.base_logprobs) == ((-0.5, -0.25), (-1.0, -2.0))
    assert {cut.steered_logprobs, cut.base_logprobs, unknown.steered_logprobs} == {None}
    assert samples_of(rollouts[:1], vocabulary, {"top_k": 5})[0].steered_logprobs is None


class CountingScorer:
    """Version 2; rewards are the number of the output's words. Remembers what it was asked."""

    name = "lucky"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def score(self, inputs: Any) -> Any:
        self.asked += [item.output for item in inputs]
        return ScoreReply(rewards=[float(len(item.output.split())) for item in inputs], version="2")


def value(version: str, raw: float, name: str = "lucky") -> RewardValue:
    return RewardValue(name=name, version=version, raw=raw)


def test_only_rewards_of_the_current_version_are_taken_from_the_log(vocabulary: Vocabulary) -> None:
    rollouts = [
        rollout(0, (1,), rewards=[value("2", 50.0)]),
        rollout(1, (1, 2), rewards=[value("1", 60.0)]),
        rollout(2, (1, 2, 3), rewards=[value("2", 70.0, name="other")]),
        rollout(3, (1, 2, 3, 4)),
    ]
    scorer = CountingScorer()
    assert score_logged(rollouts, samples_of(rollouts, vocabulary, {}), scorer) == [50.0, 2.0, 3.0, 4.0]
    assert "t1" not in scorer.asked


def test_a_fully_scored_log_needs_one_score_to_know_the_version(vocabulary: Vocabulary) -> None:
    scorer = CountingScorer()
    rollouts = [rollout(i, (1,), rewards=[value("2", 5.0)]) for i in range(9)]
    assert score_logged(rollouts, samples_of(rollouts, vocabulary, {}), scorer) == [5.0] * 9
    assert scorer.asked == ["t1"]
    assert score_logged([], [], scorer) == []
