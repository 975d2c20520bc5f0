"""Means over prompts with their errors. Prompts are the units, since samples of one prompt have it in common."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

Statistic = Callable[..., Any]
"""Takes columns `[..., prompts]` and the name `axis`; gives `[...]`."""

IntervalMethod = Literal["bca", "percentile", "t"]
"""`t` is mean ± t · standard error with one degree of freedom less than there are prompts; `bca` and `percentile`
resample prompts (Efron 1987)."""


_MOST_IN_MEMORY = 4_000_000
"""Numbers of each column that resamples may take up at a time."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, or a ratio of means, over prompts.

    Attributes:
        value: The estimate.
        standard_error: Over prompts; None with a single prompt.
        low: Lower end of the interval; None with a single prompt.
        high: Upper end.
        method: How the interval was made: one of `IntervalMethod`; `exact` where all prompts agree on an end of the
            range that the quantity is known to lie in; `none` where all prompts agree on anything else (the interval is
            then a point) or where there is one prompt only (there is none).
    """

    value: float
    standard_error: float | None
    low: float | None
    high: float | None
    method: str


@dataclass(frozen=True, slots=True)
class Intervals:
    """Makes intervals, always the same from the same numbers.

    Attributes:
        method: How.
        confidence: Coverage, such as 0.95.
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap. Every estimate resamples the same prompts.
    """

    method: IntervalMethod = "t"
    confidence: float = 0.95
    num_resamples: int = 2000
    seed: int = 0

    def mean(self, values: Sequence[float] | Floats, bounds: tuple[float, float] | None = None) -> Estimate:
        """The mean of one value per prompt.

        Args:
            values: `[prompts]`, at least one.
            bounds: The range that the values are known to lie in.
        """
        numbers = np.asarray(values, dtype=np.float64)
        return self._estimate(numbers, np.ones_like(numbers), bounds)

    def ratio(self, numerators: Floats, denominators: Floats) -> Estimate | None:
        """Sum of numerators over sum of denominators, one of each per prompt; None when there is nothing to divide by.

        The standard error is that of the linearised ratio.
        """
        if denominators.sum() == 0:
            return None
        return self._estimate(numerators, denominators, None)

    def statistic(self, function: Statistic, *columns: Floats) -> Estimate:
        """Anything else that is computed from sums or means of columns over prompts.

        The standard error is the jackknife's.

        Args:
            function: Of the columns, reduced along `axis`, which it is given by name.
            columns: `[prompts]` each.
        """
        value = float(function(*columns, axis=-1))
        num = len(columns[0])
        if num < 2:
            return Estimate(value, None, None, None, "none")
        without = np.array([float(function(*(np.delete(c, i) for c in columns), axis=-1)) for i in range(num)])
        error = float(np.sqrt(((without - without.mean()) ** 2).sum() * (num - 1) / num))
        if error <= 1e-12 * max(1.0, abs(value)):
            return Estimate(value, 0.0, value, value, "none")
        low, high = self._ends(value, error, num, function, columns)
        return Estimate(value, error, low, high, self.method)

    def _estimate(self, numerators: Floats, denominators: Floats, bounds: tuple[float, float] | None) -> Estimate:
        num = len(numerators)
        value = float(numerators.sum() / denominators.sum())
        if num < 2:
            return Estimate(value, None, None, None, "none")
        residuals = (numerators - value * denominators) / denominators.mean()
        if np.abs(residuals).max() <= 1e-12 * max(1.0, abs(value)):
            return self._agreed(value, num, bounds)
        error = float(np.sqrt((residuals**2).sum() / (num - 1) / num))
        low, high = self._ends(value, error, num, _ratio, (numerators, denominators))
        if bounds is not None:
            low, high = max(low, bounds[0]), min(high, bounds[1])
        return Estimate(value, error, low, high, self.method)

    def _ends(
        self, value: float, error: float, num: int, function: Statistic, columns: Sequence[Floats]
    ) -> tuple[float, float]:
        if self.method == "t":
            half = float(stats.t.ppf(0.5 + self.confidence / 2, num - 1)) * error
            return value - half, value + half
        result = stats.bootstrap(
            tuple(columns),
            function,
            paired=True,
            vectorized=True,
            n_resamples=self.num_resamples,
            batch=max(1, _MOST_IN_MEMORY // num),
            confidence_level=self.confidence,
            method="BCa" if self.method == "bca" else "percentile",
            rng=np.random.default_rng([self.seed, 1]),
        )
        return float(result.confidence_interval.low), float(result.confidence_interval.high)

    def _agreed(self, value: float, num: int, bounds: tuple[float, float] | None) -> Estimate:
        """All prompts have the same value, which resampling would take for certainty.

        A mean below m of numbers up to the bound 1 has at most the share m of them at 1, so it shows num of them there
        with probability m^num at most: the exact (Clopper-Pearson) bound for a share, mirrored and scaled.
        """
        ends = [end for end in bounds or () if math.isclose(value, end, abs_tol=1e-9)]
        if bounds is None or len(ends) != 1:
            return Estimate(value, 0.0, value, value, "none")
        low, high = bounds
        reach = (high - low) * (1 - float(((1 - self.confidence) / 2) ** (1 / num)))
        if ends == [low]:
            return Estimate(low, 0.0, low, low + reach, "exact")
        return Estimate(high, 0.0, high - reach, high, "exact")


def _ratio(numerators: Floats, denominators: Floats, axis: int = -1) -> Floats:
    return np.asarray(numerators.sum(axis=axis) / denominators.sum(axis=axis))
