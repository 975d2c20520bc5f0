"""The scorers of a prompt: by method of calibration, of one reward and of mixes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from trimtab_adapters.contract.errors import ConflictError, InvalidRequestError, NotFoundError, RewardError
from trimtab_adapters.contract.joint_calibration import JointCalibrator
from trimtab_adapters.contract.pooled_calibration import PooledCalibrator
from trimtab_adapters.contract.prompt_features import NUM_BUCKETS, PromptFeatures
from trimtab_adapters.contract.reference_policy import ReferencePolicy
from trimtab_adapters.contract.rewards import Combine, RewardChoice, RewardInput
from trimtab_server.decoding.pooled import PooledCalibrators
from trimtab_server.decoding.reference import MemoryCalibratorStore, ReferenceCalibrators
from trimtab_server.decoding.scoring import CalibratedScoring, CalibrationChoice, PromptScorer
from trimtab_server.rewards.resolved import ResolvedReward
from trimtab_server.storage.base import StoredPooledCalibrator

pytestmark = pytest.mark.anyio

POLICY = ReferencePolicy.of("base", "completions", {"temperature": 0.7, "max_tokens": 8})
KEY = POLICY.key


class NumberReward:
    """Reads the score out of the output: the number at a place of a list such as `3,-1`."""

    def __init__(self, name: str, place: int = 0, version: str = "1") -> None:
        self.name = name
        self.version = version
        self.place = place
        self.scored: list[str] = []

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        self.scored += [item.output for item in inputs]
        try:
            return [float(item.output.split(",")[self.place]) for item in inputs]
        except ValueError as exc:
            raise RewardError("cannot score") from exc


def alone(reward: NumberReward) -> ResolvedReward:
    return ResolvedReward(reward.name, reward.version, (reward,))


def mixed(combine: Combine = "min", weights: tuple[float, ...] = (0.5, 0.5)) -> ResolvedReward:
    parts = (NumberReward("helpful", 0), NumberReward("harmless", 1))
    return ResolvedReward("mix", "1+1", parts, combine, weights)


class OneReward:
    """A registry that knows one thing."""

    def __init__(self, resolved: ResolvedReward) -> None:
        self._resolved = resolved

    async def resolve(self, choice: RewardChoice) -> ResolvedReward:
        return self._resolved


class ListedCalibrators:
    """A `PooledCalibratorStore` over a list."""

    def __init__(self, *stored: StoredPooledCalibrator) -> None:
        self._stored = stored

    async def get(self, calibrator_id: str) -> StoredPooledCalibrator | None:
        return next((one for one in self._stored if one.id == calibrator_id), None)

    async def of_reward(self, reward_name: str) -> Sequence[StoredPooledCalibrator]:
        return [one for one in self._stored if one.reward_name == reward_name]


def pooled(
    calibrator_id: str = "cal-1", *, reward: str = "number@1", policy: ReferencePolicy = POLICY
) -> StoredPooledCalibrator:
    """Quartiles 10, 20 and 30 for every prompt."""
    features = PromptFeatures(np.zeros((0, NUM_BUCKETS)), np.zeros(3), np.ones(3))
    levels, quantiles = np.array([0.25, 0.5, 0.75]), np.array([10.0, 20.0, 30.0])
    calibrator = PooledCalibrator(features, levels, quantiles, np.zeros((3, 3)), policy.key, reward, 400, 50, 0.1)
    return StoredPooledCalibrator(calibrator_id, calibrator, {}, 0.0)


Make = Callable[..., Any]


@pytest.fixture
def scorer_of(scripted_draw: Any) -> Make:
    async def make(
        resolved: ResolvedReward,
        calibration: CalibrationChoice = CalibrationChoice(),  # noqa: B008 frozen
        *,
        texts: Sequence[str] = ("0,0",) * 4,
        stored: Sequence[StoredPooledCalibrator] = (),
        prompt: str = "p",
        identity: Callable[[], str | None] | None = None,
        calibrators: ReferenceCalibrators | None = None,
    ) -> tuple[PromptScorer, Any]:
        calibrators = calibrators or ReferenceCalibrators(MemoryCalibratorStore(), default_size=4)
        registry: Any = OneReward(resolved)
        scoring = CalibratedScoring(
            registry, calibrators, PooledCalibrators(ListedCalibrators(*stored)), base_identity=identity
        )
        draw = scripted_draw(list(texts), key=KEY)
        scorer = await scoring.for_prompt(
            "number", calibration=calibration, prompt=prompt, prompt_token_ids=[1], draw_reference=draw
        )
        return scorer, draw

    return make


async def test_auto_ranks_among_reference_rollouts(scorer_of: Make) -> None:
    scorer, draw = await scorer_of(alone(NumberReward("number")), texts=["1", "2", "2", "4"])
    [two, nine] = await scorer.score(["2", "9"])
    assert (two.calibrated, nine.calibrated) == (0.5, 1.0)
    assert (two.calibration_size, two.calibration_method, two.calibration_stale, two.parts) == (
        4,
        "reference",
        False,
        None,
    )
    assert (draw.asked, scorer.is_calibrated, scorer.is_incremental) == ([4], True, True)


@pytest.mark.parametrize("calibration", [CalibrationChoice(size=0), CalibrationChoice(method="none")])
async def test_without_calibration_nothing_is_drawn(scorer_of: Make, calibration: CalibrationChoice) -> None:
    scorer, draw = await scorer_of(alone(NumberReward("number")), calibration)
    await scorer.prepare()
    [value] = await scorer.score(["2"])
    assert (value.raw, value.calibrated, value.calibration_method) == (2.0, None, None)
    assert (draw.asked, scorer.is_calibrated, scorer.is_incremental) == ([], False, True)


async def test_a_mix_is_not_left_raw(scorer_of: Make) -> None:
    with pytest.raises(InvalidRequestError, match="only be combined when they are calibrated"):
        await scorer_of(mixed(), CalibrationChoice(size=0))


async def test_leave_one_out_ranks_the_outputs_among_each_other(scorer_of: Make) -> None:
    scorer, draw = await scorer_of(alone(NumberReward("number")), CalibrationChoice(method="leave_one_out"))
    await scorer.prepare()
    values = await scorer.score(["5", "1", "5", "0"])
    assert [v.calibrated for v in values] == [2.5 / 3, 1 / 3, 2.5 / 3, 0.0]
    assert {v.calibration_size for v in values} == {3}
    assert {v.calibration_method for v in values} == {"leave_one_out"}
    p = (3 * 1 / 3 + 0.5) / 4  # shrunk by half a count
    assert values[1].calibration_error == pytest.approx(math.sqrt(p * (1 - p) / 3))
    assert (draw.asked, scorer.is_calibrated, scorer.is_incremental) == ([], True, False)


async def test_leave_one_out_of_one_output_is_refused(scorer_of: Make) -> None:
    scorer, _ = await scorer_of(alone(NumberReward("number")), CalibrationChoice(method="leave_one_out"))
    with pytest.raises(InvalidRequestError, match="at least two"):
        await scorer.score(["1"])


REFERENCES = ["0,3", "1,2", "2,1", "3,0", "9,9"]


async def test_a_mix_is_calibrated_part_by_part_and_then_again(scorer_of: Make) -> None:
    scorer, draw = await scorer_of(mixed(), CalibrationChoice(size=5), texts=REFERENCES)
    [value] = await scorer.score(["2.5,0.5"])
    rows = tuple(tuple(map(float, text.split(","))) for text in REFERENCES)
    joint = JointCalibrator(rows, "min", (0.5, 0.5))
    assert (value.name, value.version) == ("mix", "1+1")
    assert value.raw == joint.combined([2.5, 0.5])
    assert value.calibrated == joint.calibrate([2.5, 0.5])
    assert value.calibration_error == joint.standard_error([2.5, 0.5])
    assert value.calibration_size == 5
    assert value.parts is not None
    assert [(p.name, p.raw, p.calibrated, p.calibration_size) for p in value.parts] == [
        ("helpful", 2.5, 3 / 5, 5),
        ("harmless", 0.5, 1 / 5, 5),
    ]
    assert draw.asked == [5]


async def test_a_mix_of_other_weights_or_another_combination_uses_the_same_rollouts(scorer_of: Make) -> None:
    calibrators = ReferenceCalibrators(MemoryCalibratorStore(), default_size=5)
    first, draw = await scorer_of(mixed(), texts=REFERENCES, calibrators=calibrators)
    await first.score(["1,1"])
    second, unused = await scorer_of(mixed("mean", (0.9, 0.1)), texts=[], calibrators=calibrators)
    await second.score(["1,1"])
    assert (draw.asked, unused.asked) == ([5], [])


async def test_a_mix_is_ranked_among_each_other_without_reference_rollouts(scorer_of: Make) -> None:
    scorer, _ = await scorer_of(mixed(), CalibrationChoice(method="leave_one_out"))
    values = await scorer.score(["0,3", "1,2", "2,1", "3,0"])
    assert [v.calibrated for v in values] == [0.5 / 3, 2.5 / 3, 2.5 / 3, 0.5 / 3]
    assert [[p.calibrated for p in v.parts or []] for v in values] == [[0, 1], [1 / 3, 2 / 3], [2 / 3, 1 / 3], [1, 0]]


@pytest.mark.parametrize("method", ["reference", "leave_one_out", "pooled", "none"])
async def test_a_failed_score_is_an_error_by_every_method(scorer_of: Make, method: Any) -> None:
    scorer, _ = await scorer_of(alone(NumberReward("number")), CalibrationChoice(method=method), stored=[pooled()])
    with pytest.raises(RewardError):
        await scorer.score(["1", "bad"])


async def test_a_pooled_calibrator_is_applied_without_any_draw(scorer_of: Make) -> None:
    scorer, draw = await scorer_of(alone(NumberReward("number")), CalibrationChoice(method="pooled"), stored=[pooled()])
    await scorer.prepare()
    [value] = await scorer.score(["25"])
    assert value.calibrated == pytest.approx(0.625)
    assert (value.calibration_size, value.calibration_method, value.calibration_stale) == (400, "pooled", False)
    p = (50 * 0.625 + 0.5) / 51
    assert value.calibration_error == pytest.approx(0.1 * math.sqrt(6 * p * (1 - p)))
    assert (draw.asked, scorer.is_calibrated, scorer.is_incremental) == ([], True, True)


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (pooled(reward="number@0"), "reward version: '0', not '1'"),
        (pooled(policy=ReferencePolicy.of("old", "completions", {"temperature": 0.7, "max_tokens": 8})), "'old'"),
        (pooled(policy=ReferencePolicy.of("base", "completions", {"temperature": 1.0, "max_tokens": 8})), "not 0.7"),
        (pooled(policy=ReferencePolicy.of("base", "completions", {"temperature": 0.7})), "max_tokens: absent, not 8"),
        (pooled(policy=POLICY.identified("/models/old#1")), "identity: '/models/old#1', not None"),
    ],
    ids=["version", "base", "temperature", "max_tokens", "identity"],
)
async def test_a_stale_calibrator_is_refused_or_used_and_marked(
    scorer_of: Make, stored: StoredPooledCalibrator, told: str
) -> None:
    reward = alone(NumberReward("number"))
    for named in (None, "cal-1"):
        with pytest.raises(ConflictError, match="cal-1 is stale") as refused:
            await scorer_of(reward, CalibrationChoice(method="pooled", calibrator=named), stored=[stored])
        assert told in refused.value.message
        assert refused.value.code == "calibrator_stale"
        choice = CalibrationChoice(method="pooled", calibrator=named, allow_stale=True)
        scorer, _ = await scorer_of(reward, choice, stored=[stored])
        [value] = await scorer.score(["20"])
        assert (value.calibrated, value.calibration_stale) == (0.5, True)


async def test_the_base_s_identity_is_compared_where_the_engine_tells_it(scorer_of: Make) -> None:
    stored = pooled(policy=POLICY.identified("/models/b#1"))
    choice, reward = CalibrationChoice(method="pooled"), alone(NumberReward("number"))
    scorer, _ = await scorer_of(reward, choice, stored=[stored], identity=lambda: "/models/b#1")
    assert not (await scorer.score(["1"]))[0].calibration_stale
    with pytest.raises(ConflictError, match=r"identity: '/models/b#1', not '/models/c#1'"):
        await scorer_of(reward, choice, stored=[stored], identity=lambda: "/models/c#1")


async def test_a_fresh_calibrator_is_preferred_to_a_newer_stale_one(scorer_of: Make) -> None:
    newest_first = [pooled("cal-new", reward="number@0"), pooled("cal-old")]
    scorer, _ = await scorer_of(alone(NumberReward("number")), CalibrationChoice(method="pooled"), stored=newest_first)
    assert not (await scorer.score(["1"]))[0].calibration_stale


async def test_what_is_not_there_is_not_found(scorer_of: Make) -> None:
    reward = alone(NumberReward("number"))
    with pytest.raises(NotFoundError, match="no pooled calibrator"):
        await scorer_of(reward, CalibrationChoice(method="pooled"))
    with pytest.raises(NotFoundError, match="no calibrator 'cal-2'"):
        await scorer_of(reward, CalibrationChoice(method="pooled", calibrator="cal-2"), stored=[pooled()])


async def test_a_calibrator_of_another_reward_is_refused_even_if_stale_is_allowed(scorer_of: Make) -> None:
    choice = CalibrationChoice(method="pooled", calibrator="cal-1", allow_stale=True)
    with pytest.raises(InvalidRequestError, match="for the reward 'other', not for 'number'"):
        await scorer_of(alone(NumberReward("number")), choice, stored=[pooled(reward="other@1")])


async def test_a_pooled_calibrator_needs_a_text_and_one_reward(scorer_of: Make) -> None:
    choice = CalibrationChoice(method="pooled")
    with pytest.raises(InvalidRequestError, match="by its text"):
        await scorer_of(alone(NumberReward("number")), choice, stored=[pooled()], prompt=" \n")
    with pytest.raises(InvalidRequestError, match="not for a mix"):
        await scorer_of(mixed(), choice, stored=[pooled()])


async def test_per_prompt_scores_of_another_base_are_not_taken(scorer_of: Make) -> None:
    calibrators = ReferenceCalibrators(MemoryCalibratorStore(), default_size=4)
    reward = alone(NumberReward("number"))
    asked = []
    for identity in ("a#1", "a#1", "b#1"):
        scorer, draw = await scorer_of(reward, identity=lambda told=identity: told, calibrators=calibrators)
        await scorer.score(["1"])
        asked.append(draw.asked)
    assert asked == [[4], [], [4]]
