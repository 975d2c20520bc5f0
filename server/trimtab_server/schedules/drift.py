"""Whether rewards have fallen: the test behind a schedule's drift trigger."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True, slots=True)
class DriftTest:
    """A window of requests against an older one.

    Attributes:
        older_mean: Mean reward of the older window.
        newer_mean: Mean reward of the newer one.
        p_value: Odds of a difference at least as bad when both come from the same distribution.
    """

    older_mean: float
    newer_mean: float
    p_value: float


def compare_windows(older: Sequence[float], newer: Sequence[float]) -> DriftTest:
    """Welch's one-sided test that the newer mean is lower.

    It takes requests as independent, one value each. Means of 30 requests or more are close to normal for rewards that
    are bounded, so the odds of a false alarm are close to the level that the p-value is compared with.

    Args:
        older: Rewards, at least 2.
        newer: Likewise.
    """
    means = float(np.mean(older)), float(np.mean(newer))
    if np.ptp(older) == 0.0 and np.ptp(newer) == 0.0:  # nothing varies: the means are what they are
        return DriftTest(*means, p_value=0.0 if means[1] < means[0] else 1.0)
    result = stats.ttest_ind(newer, older, equal_var=False, alternative="less")
    return DriftTest(*means, p_value=float(result.pvalue))
