"""What selection strategies cost and give beside plain best-of-n: tokens at equal calibrated reward, and reward kept.

Letters: P prompts. Intervals are 95 % bootstrap intervals over prompts, which redraw prompts for all systems together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

Floats = NDArray[np.float64]
NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Costs:
    """One system's means over the requests of each prompt, `[P]` each.

    Attributes:
        calibrated: Calibrated reward of the choices.
        reward: Their raw reward, log-odds.
        probability: The same as a probability.
        tokens: Generated for one request, all candidates counted.
    """

    calibrated: Floats
    reward: Floats
    probability: Floats
    tokens: Floats


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with its bootstrap interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> list[float]:
        """The three numbers."""
        return [self.value, self.low, self.high]

    @override
    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Match:
    """Where a sweep reaches the calibrated reward of plain best-of-n.

    Attributes:
        setting: The value of the swept parameter there.
        token_ratio: Tokens there to those of best-of-n.
    """

    setting: float
    token_ratio: float


def match(plain: Costs, settings: Sequence[float], sweep: Sequence[Costs], prompts: NDArray[np.int64]) -> Match | None:
    """Interpolate tokens and setting at equal mean calibrated reward; None when the sweep does not reach it.

    Args:
        plain: Best-of-n.
        settings: Values of the swept parameter, increasing; larger ones give larger rewards.
        sweep: What was measured at each of them.
        prompts: Which prompts to average over, repetitions allowed.
    """
    target = plain.calibrated[prompts].mean()
    reached = [float(costs.calibrated[prompts].mean()) for costs in sweep]
    tokens = [float(costs.tokens[prompts].mean()) for costs in sweep]
    for i in range(1, len(reached)):
        low, high = reached[i - 1], reached[i]
        if low <= target <= high:
            share = 0.0 if high == low else (target - low) / (high - low)
            there = tokens[i - 1] + share * (tokens[i] - tokens[i - 1])
            setting = settings[i - 1] + share * (settings[i] - settings[i - 1])
            return Match(setting, there / float(plain.tokens[prompts].mean()))
    return None


def matched_ratio(plain: Costs, settings: Sequence[float], sweep: Sequence[Costs]) -> tuple[Match, Interval] | None:
    """`match` over all prompts, and its token ratio with an interval; None when the sweep does not reach it."""
    everything = np.arange(len(plain.tokens))
    found = match(plain, settings, sweep, everything)
    if found is None:
        return None
    resampled = [match(plain, settings, sweep, prompts) for prompts in _resamples(len(everything))]
    ratios = [one.token_ratio for one in resampled if one is not None]
    return found, _interval(found.token_ratio, ratios)


def token_ratio(plain: Costs, other: Costs) -> Interval:
    """Tokens of another system to those of best-of-n."""
    return _bootstrap(lambda p: float(other.tokens[p].mean() / plain.tokens[p].mean()), len(plain.tokens))


def calibrated_loss(plain: Costs, other: Costs) -> Interval:
    """By which part the mean calibrated reward is lower than that of best-of-n."""
    return _bootstrap(lambda p: 1 - float(other.calibrated[p].mean() / plain.calibrated[p].mean()), len(plain.tokens))


def probability_loss(plain: Costs, other: Costs) -> Interval:
    """By which part the mean probability that the classifier gives the wanted class is lower."""
    return _bootstrap(lambda p: 1 - float(other.probability[p].mean() / plain.probability[p].mean()), len(plain.tokens))


def gain_lost(plain: Costs, other: Costs, base: Floats) -> Interval:
    """By which part the raw reward rises less over the base's mean than that of best-of-n; `base` is `[P]`."""

    def lost(p: NDArray[np.int64]) -> float:
        return 1 - float((other.reward[p] - base[p]).mean() / (plain.reward[p] - base[p]).mean())

    return _bootstrap(lost, len(plain.tokens))


def _resamples(num_prompts: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, num_prompts, (NUM_RESAMPLES, num_prompts))


def _bootstrap(statistic: Callable[[NDArray[np.int64]], float], num_prompts: int) -> Interval:
    values = [statistic(prompts) for prompts in _resamples(num_prompts)]
    return _interval(statistic(np.arange(num_prompts)), values)


def _interval(value: float, resampled: Sequence[float]) -> Interval:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(value, float(low), float(high))
