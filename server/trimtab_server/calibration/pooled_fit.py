"""Fits the quantiles of a reward as a function of the prompt, and measures the fit on prompts it has not seen.

Three models compete: the distribution over all prompts together, whatever the prompt; that distribution shifted and
stretched by the prompt; and a linear quantile regression for each level (Koenker and Bassett, 1978). The one with the
smallest pinball loss on held-out prompts wins, a simpler one unless it is beaten by more than 1 %. Prompts are split,
never rollouts: two rollouts of one prompt know each other's distribution.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.pooled_calibration import PooledCalibrator, calibrated_by_quantiles
from trimtab_adapters.contract.prompt_features import NUM_BUCKETS, PromptFeatures, hashed_words, lengths
from trimtab_server.calibration.reliability import HeldOut, Reliability, measure

Floats = NDArray[np.float64]

MIN_PROMPTS = 20
"""With at least `MIN_ROLLOUTS` rollouts each: with fewer, nothing can be said of prompts that were held out."""
MIN_ROLLOUTS = 3
MAX_ROLLOUTS = 20_000
MAX_ROLLOUTS_PER_PROMPT = 64
"""More of one prompt tell little of others, and would weigh more than theirs."""

_FINE = np.arange(1, 200) / 200
_COARSE = np.array([0.005, 0.01, 0.02, 0.03, 0.05, *np.arange(2, 19) / 20, 0.95, 0.97, 0.98, 0.99, 0.995])
_JUDGED = np.arange(1, 20) / 20
_MAX_DIRECTIONS = 16
_MAX_REGRESSED = 2000
"""Rows of a quantile regression, whose linear programs take time with the square of their number."""
_WEIGHT_PENALTY = 3e-3
_MARGIN = 0.01


@dataclass(frozen=True, slots=True)
class PromptRewards:
    """Raw rewards of independent samples of the reference policy for one prompt."""

    prompt: str
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PooledFit:
    """A fitted calibrator and what is known of it.

    Attributes:
        calibrator: What applies it.
        model: Which model won: `unconditional`, `location_scale` or `quantile_regression`.
        pinball: Mean pinball loss of each model on the prompts that chose between them, in units of the reward.
        reliability: On prompts that took no part at all.
    """

    calibrator: PooledCalibrator
    model: str
    pinball: dict[str, float]
    reliability: Reliability


@dataclass(frozen=True, slots=True)
class _Lines:
    """Quantiles that are linear in the features."""

    levels: Floats
    intercepts: Floats
    slopes: Floats


def fit_pooled(groups: Sequence[PromptRewards], *, reference: str, reward: str, seed: int = 0) -> PooledFit:
    """Fit on most prompts, choose on some, measure on the rest. Takes seconds: not for an event loop.

    Args:
        groups: One per prompt.
        reference: What the rollouts were drawn from, a `ReferencePolicy.key`.
        reward: Name and version of the reward.
        seed: Of the split and of ties broken at random.

    Raises:
        InvalidRequestError: There is too little to fit and measure.
    """
    rng = np.random.default_rng(seed)
    train, choose, test = split_prompts(groups, rng)
    models: dict[str, Callable[[PromptFeatures, Sequence[PromptRewards]], _Lines]] = {
        "unconditional": _unconditional,
        "location_scale": _location_scale,
        "quantile_regression": _quantile_regression,
    }
    features = _fit_features(train)
    pinball = {name: _pinball(model(features, train), features, choose) for name, model in models.items()}
    chosen = "unconditional"
    for name in list(models)[1:]:
        if pinball[name] < (1 - _MARGIN) * pinball[chosen]:
            chosen = name
    used = [*train, *choose]
    features = _fit_features(used)
    lines = models[chosen](features, used)
    calibrator = PooledCalibrator(
        features=features,
        levels=lines.levels,
        intercepts=lines.intercepts,
        slopes=lines.slopes,
        reference=reference,
        reward=reward,
        num_rollouts=sum(len(group.rewards) for group in used),
        num_prompts=len(used),
        error=1.0,
    )
    calibrator = replace(calibrator, error=_error(calibrator, test))
    reliability = measure([_held_out(calibrator, group, rng) for group in test])
    return PooledFit(calibrator, chosen, pinball, reliability)


def split_prompts(
    groups: Sequence[PromptRewards], rng: np.random.Generator
) -> tuple[list[PromptRewards], list[PromptRewards], list[PromptRewards]]:
    """Three fifths to fit, one to choose, one to measure; prompts with few rollouts only to fit."""
    capped = [replace(group, rewards=group.rewards[:MAX_ROLLOUTS_PER_PROMPT]) for group in groups if group.rewards]
    full = [group for group in capped if len(group.rewards) >= MIN_ROLLOUTS]
    if len(full) < MIN_PROMPTS:
        raise InvalidRequestError(
            f"A pooled calibrator needs at least {MIN_PROMPTS} prompts with {MIN_ROLLOUTS} samples of the base model "
            f"each, and there are {len(full)}.",
            param="prompts",
        )
    order = rng.permutation(len(full))
    fifth = len(full) // 5
    few = [group for group in capped if len(group.rewards) < MIN_ROLLOUTS]
    parts = [[full[i] for i in picked] for picked in (order[2 * fifth :], order[:fifth], order[fifth : 2 * fifth])]
    return parts[0] + few, parts[1], parts[2]


def _fit_features(groups: Sequence[PromptRewards]) -> PromptFeatures:
    from sklearn.decomposition import TruncatedSVD  # noqa: PLC0415  slow to import, and only fitting needs it

    prompts = [group.prompt for group in groups]
    words = hashed_words(prompts)
    count = min(_MAX_DIRECTIONS, len(prompts) // 10)
    if count and np.ptp(words, axis=0).any():
        directions = TruncatedSVD(count, random_state=0).fit(words).components_
    else:
        directions = np.zeros((0, NUM_BUCKETS))
    raw = np.concatenate([words @ directions.T, lengths(prompts)], axis=1)
    scale = raw.std(axis=0)
    return PromptFeatures(np.asarray(directions), raw.mean(axis=0), np.where(scale > 1e-9, scale, 1.0))


def _rows(features: PromptFeatures, groups: Sequence[PromptRewards]) -> tuple[Floats, Floats]:
    """Features and rewards, rollout by rollout."""
    of_prompts = features.apply([group.prompt for group in groups])
    counts = [len(group.rewards) for group in groups]
    return np.repeat(of_prompts, counts, axis=0), np.array([reward for group in groups for reward in group.rewards])


def _quantiles(values: Floats, levels: Floats) -> Floats:
    # Observed values, none between them: ties of a coarse reward stay ties.
    return np.asarray(np.quantile(values, levels, method="inverted_cdf"), dtype=np.float64)


def _unconditional(features: PromptFeatures, groups: Sequence[PromptRewards]) -> _Lines:
    _, y = _rows(features, groups)
    return _Lines(_FINE, _quantiles(y, _FINE), np.zeros((len(_FINE), features.num_features)))


def _location_scale(features: PromptFeatures, groups: Sequence[PromptRewards]) -> _Lines:
    """y = m(x) + s(x) z with m and s linear and z of one distribution; its quantiles are linear in x."""
    from sklearn.linear_model import RidgeCV  # noqa: PLC0415

    x, y = _rows(features, groups)
    penalties = np.logspace(-1, 4, 11)
    location = RidgeCV(penalties).fit(x, y)
    residuals = y - location.predict(x)
    scale = RidgeCV(penalties).fit(x, np.abs(residuals))
    spread = scale.predict(x)
    slopes, intercept = np.asarray(scale.coef_), float(scale.intercept_)
    if spread.min() <= 0.1 * spread.mean():  # a line that falls to nothing somewhere tells nothing about scales
        slopes, intercept = np.zeros_like(slopes), 1.0
        spread = np.ones_like(spread)
    z = _quantiles(residuals / spread, _FINE)
    return _Lines(
        _FINE, float(location.intercept_) + intercept * z, np.asarray(location.coef_) + z[:, None] * slopes[None, :]
    )


def _quantile_regression(features: PromptFeatures, groups: Sequence[PromptRewards]) -> _Lines:
    from sklearn.linear_model import QuantileRegressor  # noqa: PLC0415

    x, y = _rows(features, groups)
    if len(y) > _MAX_REGRESSED:
        picked = np.random.default_rng(0).choice(len(y), _MAX_REGRESSED, replace=False)
        x, y = x[picked], y[picked]
    middle, width = float(np.median(y)), float(y.std()) or 1.0
    fitted: list[Any] = [
        QuantileRegressor(quantile=float(level), alpha=_WEIGHT_PENALTY, solver="highs").fit(x, (y - middle) / width)
        for level in _COARSE
    ]
    intercepts = np.array([middle + width * float(model.intercept_) for model in fitted])
    return _Lines(_COARSE, intercepts, width * np.array([model.coef_ for model in fitted]))


def _pinball(lines: _Lines, features: PromptFeatures, groups: Sequence[PromptRewards]) -> float:
    """Mean over levels and rollouts of max(t (y - q), (t - 1) (y - q)); least in expectation for the true quantiles."""
    x, y = _rows(features, groups)
    quantiles = np.sort(lines.intercepts + x @ lines.slopes.T, axis=1)
    judged = np.array([np.interp(_JUDGED, lines.levels, row) for row in quantiles])
    above = y[:, None] - judged
    return float(np.maximum(_JUDGED * above, (_JUDGED - 1) * above).mean())


def _held_out(calibrator: PooledCalibrator, group: PromptRewards, rng: np.random.Generator) -> HeldOut:
    quantiles, rewards = calibrator.quantiles([group.prompt])[0], np.asarray(group.rewards)
    below, above = (
        calibrated_by_quantiles(
            quantiles, calibrator.levels, np.asarray([math.nextafter(r, limit) for r in group.rewards])
        )
        for limit in (-math.inf, math.inf)
    )
    randomised = below + rng.random(len(rewards)) * (above - below)
    calibrated = calibrated_by_quantiles(quantiles, calibrator.levels, rewards)
    return HeldOut(group.rewards, calibrated.tolist(), randomised.tolist())


def _error(calibrator: PooledCalibrator, groups: Sequence[PromptRewards]) -> float:
    """Root mean square of C_pooled(x, y) - C(x, y) over prompts and their rollouts, without bias for its square.

    Against two other rollouts of the prompt, w and v are independent estimates of C(x, y) without bias, so the mean of
    (C_pooled - w) (C_pooled - v) is (C_pooled - C)². Over all pairs of the K - 1 others it is the squared distance from
    their mean, less the variance of that mean. Never told as less than what the number of prompts allows.
    """
    per_prompt = []
    for group in groups:
        y = np.asarray(group.rewards)
        pooled = np.asarray(calibrator.calibrate(group.prompt, list(group.rewards)))
        wins = (y[None, :] < y[:, None]) + 0.5 * (y[None, :] == y[:, None])
        np.fill_diagonal(wins, 0.0)
        others = len(y) - 1
        mean = wins.sum(1) / others
        variance = np.maximum((wins**2).sum(1) / others - mean**2, 0.0) / (others - 1)
        per_prompt.append(float(((pooled - mean) ** 2 - variance).mean()))
    least = 1 / (6 * calibrator.num_prompts)  # the mean of p (1 - p) / n over p
    return math.sqrt(max(float(np.mean(per_prompt)), least))
