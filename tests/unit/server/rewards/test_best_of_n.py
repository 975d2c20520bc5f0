"""Ranking candidates."""

import math
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from trimtab_adapters.contract.errors import NotFoundError, RewardError
from trimtab_adapters.contract.records import RewardValue
from trimtab_adapters.contract.rewards import RewardInput, RewardModel, RewardSpec
from trimtab_server.decoding.candidates import Selection, ranked
from trimtab_server.decoding.reference import MemoryCalibratorStore, ReferenceCalibrators
from trimtab_server.decoding.scoring import CalibratedScoring, CalibrationChoice, Scoring
from trimtab_server.engine.base import Candidate
from trimtab_server.rewards.callable import CallableReward
from trimtab_server.rewards.registry import RewardRegistry

pytestmark = pytest.mark.anyio


def no_entry_points() -> list[EntryPoint]:
    return []


class LengthReward:
    """Builds a reward that gives the length of the output, and counts what it scores."""

    def __init__(self) -> None:
        self.scored: list[str] = []

    def __call__(self, spec: RewardSpec) -> RewardModel:
        return CallableReward(spec.name, "1", self.score)

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        self.scored += [item.output for item in inputs]
        if any(item.output == "bad" for item in inputs):
            raise RewardError("cannot score")
        return [float(len(item.output)) for item in inputs]


@pytest.fixture
def length() -> LengthReward:
    return LengthReward()


@pytest.fixture
def scoring(length: LengthReward) -> Scoring:
    registry = RewardRegistry(
        [RewardSpec(name="length", kind="callable", target="length")],
        entry_points=no_entry_points,
        builders={"callable": length},
    )
    return CalibratedScoring(registry, ReferenceCalibrators(MemoryCalibratorStore(), default_size=4))


async def select(
    scoring: Scoring,
    candidates: Sequence[Candidate],
    draw: Any,
    *,
    reward: str | None = "length",
    calibration_size: int | None = None,
) -> list[Selection]:
    if reward is None:
        return ranked([(candidate, None) for candidate in candidates])
    scorer = await scoring.for_prompt(
        reward,
        calibration=CalibrationChoice(size=calibration_size),
        prompt="p",
        prompt_token_ids=[1, 2],
        draw_reference=draw,
    )
    values = await scorer.score([candidate.text for candidate in candidates])
    return ranked(list(zip(candidates, values, strict=True)))


def indices(selections: Sequence[Selection]) -> list[int]:
    return [selection.candidate.index for selection in selections]


async def test_without_a_reward_the_mean_log_probability_ranks_and_ties_keep_their_order(
    scoring: Scoring, candidate: Any, scripted_draw: Any
) -> None:
    draw = scripted_draw([])
    candidates = [
        candidate("long and sure", 0, [-1.0, -1.0, -1.0]),
        candidate("short", 1, [-2.0]),
        candidate("equal", 2, [-0.5, -1.5]),
        candidate("best", 3, [-0.1]),
    ]
    selections = await select(scoring, candidates, draw, reward=None)
    assert indices(selections) == [3, 0, 2, 1]
    assert [s.rank for s in selections] == [0, 1, 2, 3]
    assert {s.num_candidates for s in selections} == {4}
    assert {s.reward for s in selections} == {None}
    assert draw.asked == []


async def test_the_calibrated_reward_ranks_and_is_reported_with_its_error(
    scoring: Scoring, candidate: Any, scripted_draw: Any
) -> None:
    # Reference lengths 1, 2, 2, 4: C(2) = (1 + 1) / 4, C(3) = 3 / 4, C(0) = 0.
    draw = scripted_draw(["x", "xx", "yy", "xxxx"])
    candidates = [candidate("aa", 0), candidate("bbb", 1), candidate("", 2, [])]
    selections = await select(scoring, candidates, draw)
    assert indices(selections) == [1, 0, 2]

    def expected(raw: float, calibrated: float) -> RewardValue:
        p = (4 * calibrated + 0.5) / 5
        error = math.sqrt(p * (1 - p) / 4)
        return RewardValue(
            name="length",
            version="1",
            raw=raw,
            calibrated=calibrated,
            calibration_size=4,
            calibration_error=error,
            calibration_method="reference",
        )

    assert [s.reward for s in selections] == [expected(3.0, 0.75), expected(2.0, 0.5), expected(0.0, 0.0)]


async def test_the_caller_s_calibration_size_is_used_and_0_means_none(
    scoring: Scoring, candidate: Any, scripted_draw: Any
) -> None:
    draw = scripted_draw(["x"] * 7)
    [only] = await select(scoring, [candidate("aa")], draw, calibration_size=7)
    assert only.reward is not None
    assert (only.reward.calibrated, only.reward.calibration_size) == (1.0, 7)
    unasked = scripted_draw([])
    selections = await select(scoring, [candidate("a", 0), candidate("aa", 1)], unasked, calibration_size=0)
    assert indices(selections) == [1, 0]
    assert selections[0].reward == RewardValue(name="length", version="1", raw=2.0)
    assert unasked.asked == []


async def test_equal_calibrated_rewards_are_ordered_by_raw_reward_then_log_probability_then_index(
    scoring: Scoring, candidate: Any, scripted_draw: Any
) -> None:
    # All are longer than every reference rollout: calibrated 1.
    candidates = [
        candidate("aaa", 0, [-2.0]),
        candidate("bbb", 1, [-1.0]),
        candidate("ccc", 2, [-1.0]),
        candidate("dddd", 3, [-9.0]),
    ]
    selections = await select(scoring, candidates, scripted_draw(["x"] * 4))
    assert [s.reward.calibrated for s in selections if s.reward] == [1.0] * 4
    assert indices(selections) == [3, 1, 2, 0]


async def test_a_log_probability_that_is_nan_never_wins(scoring: Scoring, candidate: Any, scripted_draw: Any) -> None:
    candidates = [candidate("a", 0, [math.nan]), candidate("b", 1, [-5.0]), candidate("c", 2, [math.nan, -1.0])]
    assert indices(await select(scoring, candidates, scripted_draw([]), reward=None)) == [1, 0, 2]
    assert indices(await select(scoring, candidates, scripted_draw([]), calibration_size=0)) == [1, 0, 2]


async def test_equal_texts_are_scored_once_and_all_returned(
    scoring: Scoring, length: LengthReward, candidate: Any, scripted_draw: Any
) -> None:
    candidates = [candidate("same", 0), candidate("same", 1), candidate("other", 2)]
    selections = await select(scoring, candidates, scripted_draw([]), calibration_size=0)
    assert indices(selections) == [2, 0, 1]
    assert length.scored == ["same", "other"]


async def test_a_candidate_that_cannot_be_scored_is_an_error_never_a_zero(
    scoring: Scoring, candidate: Any, scripted_draw: Any
) -> None:
    with pytest.raises(RewardError):
        await select(scoring, [candidate("good", 0), candidate("bad", 1)], scripted_draw(["x"] * 4))
    with pytest.raises(RewardError):
        await select(scoring, [candidate("good", 0)], scripted_draw(["x", "bad", "x", "x"]))


async def test_an_unknown_reward_is_not_found(scoring: Scoring, candidate: Any, scripted_draw: Any) -> None:
    with pytest.raises(NotFoundError, match="known rewards: length"):
        await select(scoring, [candidate("a")], scripted_draw([]), reward="nope")
