"""What a calibrated reward estimated from K reference rollouts is worth: spread, band, bias of its transforms."""

import math


def smoothed(calibrated: float, k: int) -> float:
    """(K C + ½) / (K + 1): strictly between 0 and 1, for transforms that are infinite at an end.

    Args:
        calibrated: Estimated C in [0, 1].
        k: Reference rollouts that it was estimated from, >= 1.

    Raises:
        ValueError: One of the two is out of range.
    """
    _check(calibrated, k)
    return (k * calibrated + 0.5) / (k + 1)


def max_standard_deviation(k: int) -> float:
    """Largest standard deviation of an estimate from K rollouts over all C: 0.5 / √K, at C = ½ without ties."""
    _check(0.0, k)
    return 0.5 / math.sqrt(k)


def dkw_band(k: int, confidence: float = 0.95) -> float:
    """Half-width of the band that holds C at all rewards at once with at least this confidence.

    Dvoretzky, Kiefer and Wolfowitz with Massart's constant: √(log(2 / (1 - confidence)) / (2 K)).
    """
    _check(0.0, k)
    if not 0 < confidence < 1:
        raise ValueError("the confidence lies strictly between 0 and 1")
    return math.sqrt(math.log(2 / (1 - confidence)) / (2 * k))


def exponential_bias(calibrated: float, k: int, t: float) -> float:
    """E[e^{tĈ}] / e^{tC} for Ĉ from K rollouts without ties: ((1 - C) + C e^{t/K})^K / e^{tC}, never below 1.

    There is no exact correction; K of at least 100 keeps it to a few per cent up to t = 5 and to 13 % at t = 10, C = ½.
    """
    _check(calibrated, k)
    return math.exp(k * math.log1p(calibrated * math.expm1(t / k)) - t * calibrated)


def _check(calibrated: float, k: int) -> None:
    if not 0 <= calibrated <= 1:
        raise ValueError("a calibrated reward lies between 0 and 1")
    if k < 1:
        raise ValueError("K must be at least 1")
