"""Fitting a calibrator for prompts never seen, on worlds whose truth is known."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.pooled_calibration import PooledCalibrator
from trimtab_server.calibration.pooled_fit import PooledFit, PromptRewards, fit_pooled, split_prompts
from trimtab_server.calibration.reliability import HeldOut, measure, plot_reliability

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
EFFECT = dict(zip(WORDS, (3.0, -3.0, 1.5, -1.5, 0.5, -0.5), strict=True))
normal = NormalDist()


def location(prompt: str) -> float:
    return sum(EFFECT.get(word, 0.0) for word in prompt.split())


def world(
    num_prompts: int,
    num_rollouts: int,
    mean: Callable[[str], float],
    *,
    scale: Callable[[str], float] = lambda prompt: 1.0,
    step: float = 0.0,
    seed: int = 0,
) -> list[PromptRewards]:
    """Prompts of four words, rewards normal about a mean of the prompt, rounded to multiples of `step`."""
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(num_prompts):
        prompt = " ".join(rng.choice(WORDS, 4)) + f" {number}"
        rewards = mean(prompt) + scale(prompt) * rng.normal(size=num_rollouts)
        groups.append(PromptRewards(prompt, tuple((np.round(rewards / step) * step if step else rewards).tolist())))
    return groups


def fit(groups: list[PromptRewards]) -> PooledFit:
    return fit_pooled(groups, reference="base", reward="r@1")


def true_error(calibrator: PooledCalibrator, mean: Callable[[str], float]) -> float:
    """Root mean square of C_pooled - C over new prompts and samples of a normal world of scale 1."""
    squares = []
    for group in world(200, 5, mean, seed=99):
        told = calibrator.calibrate(group.prompt, list(group.rewards))
        squares += [(p - normal.cdf(r - mean(group.prompt))) ** 2 for p, r in zip(told, group.rewards, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


@pytest.fixture(scope="module")
def shifted() -> PooledFit:
    return fit(world(150, 8, location))


def test_where_the_prompt_makes_no_difference_the_simplest_model_wins() -> None:
    found = fit(world(150, 8, lambda prompt: 0.0))
    assert found.model == "unconditional"
    assert not found.calibrator.slopes.any()
    # Near the least that 120 prompts allow, √(1/(6 · 120)) = .037. The noise of the 7 other rollouts of a prompt,
    # √(1/(6 · 7)) = .154, is no error of the calibrator. Five seeds gave .037 to .072.
    assert found.calibrator.error < 0.1
    assert found.reliability.is_reliable


def test_where_the_prompt_shifts_the_reward_a_conditional_model_wins(shifted: PooledFit) -> None:
    assert shifted.model in ("location_scale", "quantile_regression")
    assert shifted.pinball[shifted.model] < 0.7 * shifted.pinball["unconditional"]
    assert shifted.calibrator.calibrate("beta beta beta beta", [0.0]) > [0.9]
    assert shifted.calibrator.calibrate("alpha alpha alpha alpha", [0.0]) < [0.1]


def test_the_error_that_is_told_is_the_true_one(shifted: PooledFit) -> None:
    # 30 held-out prompts of 8 rollouts: the estimate scatters by about a fifth over seeds.
    assert shifted.calibrator.error == pytest.approx(true_error(shifted.calibrator, location), rel=0.35)
    # The pooled distribution of all prompts alone would be uniform over prompts, and wrong for each: it is told too.
    blind = fit(world(150, 8, hash_shift))
    assert blind.reliability.is_reliable
    assert blind.calibrator.error == pytest.approx(true_error(blind.calibrator, hash_shift), rel=0.35)
    assert blind.calibrator.error > 0.2


def hash_shift(prompt: str) -> float:
    """A shift by the prompt's number, which no feature can know of another prompt."""
    return 4.0 * ((int(prompt.split()[-1]) * 0.618034) % 1.0 - 0.5)


def test_counts_are_those_of_the_fit_and_prompts_are_split_not_rollouts(shifted: PooledFit) -> None:
    assert shifted.reliability.num_prompts == 30
    assert shifted.reliability.num_rollouts == 240
    assert (shifted.calibrator.num_prompts, shifted.calibrator.num_rollouts) == (120, 960)
    assert len(shifted.reliability.values) == 30


def test_no_prompt_takes_part_in_two_steps_and_those_with_few_rollouts_only_fit() -> None:
    few = [replace(group, prompt=f"few {group.prompt}") for group in world(10, 2, location, seed=1)]
    parts = split_prompts([*world(50, 3, location), *few], np.random.default_rng(0))
    train, choose, test = [{group.prompt for group in part} for part in parts]
    assert (len(train), len(choose), len(test)) == (30 + 10, 10, 10)
    assert len(train | choose | test) == 60
    assert {group.prompt for group in few} <= train


def test_held_out_samples_are_uniform_as_told(shifted: PooledFit) -> None:
    # One seeded draw of 30 prompts; under a perfect fit 5 % of draws would exceed the critical value.
    assert shifted.reliability.ks_distance <= shifted.reliability.ks_critical
    for nominal, measured in shifted.reliability.coverage:
        assert measured == pytest.approx(nominal, abs=0.15)


def test_a_fit_repeats_exactly() -> None:
    groups = world(40, 5, location)
    assert fit(groups).calibrator.to_json() == fit(groups).calibrator.to_json()


def test_ties_count_half_and_are_broken_at_random_where_they_are_judged() -> None:
    # Rewards are 0 or 1, of which 1 has probability ½: half-tie values are ¼ and ¾, whose distance from uniform is ¼.
    rng = np.random.default_rng(1)
    coin = [PromptRewards(f"{i}", tuple(rng.integers(0, 2, 8).astype(float).tolist())) for i in range(100)]
    found = fit(coin)
    assert found.calibrator.calibrate("x", [0.0, 1.0]) == pytest.approx([0.25, 0.75], abs=0.06)
    assert found.reliability.ks_distance_of_all == pytest.approx(0.25, abs=0.08)
    assert found.reliability.share_tied == pytest.approx(0.5, abs=0.1)
    assert found.reliability.is_reliable


def test_one_prompt_with_many_rollouts_does_not_outweigh_the_others() -> None:
    groups = [*world(40, 4, lambda prompt: 0.0), PromptRewards("loud", (100.0,) * 5000)]
    found = fit(groups)
    assert found.calibrator.num_rollouts <= 33 * 4 + 64


def test_rewards_that_are_all_equal_are_in_the_middle() -> None:
    found = fit([PromptRewards(f"prompt {i}", (1.0,) * 4) for i in range(30)])
    assert found.calibrator.calibrate("x", [0.0, 1.0, 2.0]) == pytest.approx([0.0025, 0.5, 0.9975])
    assert found.reliability.share_tied == 1.0


def test_too_little_is_refused() -> None:
    few = world(19, 8, location) + world(50, 2, location, seed=1)
    with pytest.raises(InvalidRequestError, match=r"at least 20 prompts with 3 samples .* there are 19"):
        fit(few)


def test_reliability_is_measured_as_defined() -> None:
    groups = [
        HeldOut([1.0, 1.0, 2.0], [0.2, 0.2, 0.8], [0.1, 0.3, 0.8]),
        HeldOut([5.0, 6.0], [0.5, 0.6], [0.7, 0.6]),
    ]
    found = measure(groups)
    assert (found.num_prompts, found.num_rollouts, found.values) == (2, 5, [0.1, 0.7])
    assert found.ks_distance == pytest.approx(0.4)  # below the step at .5 the function is ½ from .1 on
    assert found.share_tied == pytest.approx(2 / 8)  # ordered pairs: 6 and 2, of which (1, 1) twice
    assert dict(found.coverage)[0.3] == pytest.approx(2 / 5)


def test_a_reliability_plot_is_written(tmp_path: Path) -> None:
    target = tmp_path / "plot.png"
    plot_reliability([0.1, 0.5, 0.7], target, title="kindness")
    assert target.read_bytes().startswith(b"\x89PNG")
