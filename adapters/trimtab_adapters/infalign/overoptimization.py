"""The over-optimisation law of best-of-n (Gao et al., arXiv 2210.10760): R(d) = d (α - β d) with d = √KL.

R is the gain in gold reward when a proxy reward chooses. It peaks at d* = α/2β and falls behind it: beyond that many
candidates a better proxy reward means a worse text.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from scipy.special import lambertw

from trimtab_adapters.infalign.unit_interval import FloatArray

_SIGNIFICANT = 1.959963984540054  # One-sided 2.5 %.


@dataclass(frozen=True, slots=True)
class OveroptimizationLaw:
    """A fit of the law to gains of best-of-n.

    Attributes:
        alpha: Initial slope, gold reward per √nat.
        beta: Curvature, gold reward per nat.
        alpha_standard_error: Of `alpha`.
        beta_standard_error: Of `beta`.
        max_n: Largest n among the points: what lies beyond was not measured.
    """

    alpha: float
    beta: float
    alpha_standard_error: float
    beta_standard_error: float
    max_n: int

    @classmethod
    def fit(cls, gains: FloatArray, standard_errors: FloatArray | None = None) -> Self:
        """Fit to mean gains of n = 1, 2, .. by least squares; n = 1 has KL 0 and says nothing.

        The standard errors of the parameters take the points as independent. Points of one pool of samples are not: use
        `fit_prompts` for those.

        Args:
            gains: [max_n], gain in gold reward over n = 1; at least four, that is three points for two parameters.
            standard_errors: [max_n], positive but for n = 1; without them the points count alike and their scatter
                around the law gives the errors.

        Raises:
            ValueError: Fewer than four gains, or a standard error that is not positive.
        """
        design, target, scale = _equations(gains, standard_errors)
        (alpha, beta), *_ = np.linalg.lstsq(design, target)
        covariance = np.linalg.inv(design.T @ design)
        if scale is None:
            covariance = covariance * float(np.sum((target - design @ [alpha, beta]) ** 2)) / (len(target) - 2)
        return cls(
            float(alpha), float(beta), float(np.sqrt(covariance[0, 0])), float(np.sqrt(covariance[1, 1])), len(gains)
        )

    @classmethod
    def fit_prompts(cls, per_prompt: FloatArray, *, resamples: int = 1000, seed: int = 0) -> Self:
        """Fit to the mean of per-prompt curves, with standard errors by resampling prompts.

        All points of a prompt come from one pool of samples and move together; resampling whole prompts keeps that.

        Args:
            per_prompt: [prompts, max_n], rows of `best_of_n_gold`; two prompts and n = 4 at least.
            resamples: Bootstrap samples.
            seed: Of the resampling: the same data give the same answer.

        Raises:
            ValueError: Fewer than two prompts or four n.
        """
        prompts = len(per_prompt)
        if prompts < 2:
            raise ValueError("resampling prompts needs two at least")
        gains = per_prompt - per_prompt[:, :1]
        design, target, _ = _equations(gains.mean(axis=0), None)
        solve = np.linalg.pinv(design)  # [2, points]; the fit is linear in the gains, so every resample is a product.
        draws = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
        spread = (solve @ (draws @ gains[:, 1:] / prompts).T).std(axis=1, ddof=1)
        alpha, beta = solve @ target
        return cls(float(alpha), float(beta), float(spread[0]), float(spread[1]), per_prompt.shape[1])

    def gain(self, kl: float) -> float:
        """Gain in gold reward at a KL of `kl` nats by the law."""
        return math.sqrt(kl) * (self.alpha - self.beta * math.sqrt(kl))

    @property
    def peak(self) -> float | None:
        """d* = α/2β where the gain is largest, 0 when it falls from the start; None when it does not bend down."""
        if self.beta <= 0:
            return None
        return max(0.0, self.alpha / (2 * self.beta))

    @property
    def falls_from_the_start(self) -> bool:
        """Whether the gain is below 0 from n = 2 on, or was by the largest n measured where the law is convex."""
        return self.alpha <= 0 and self.gain(_kl(self.max_n)) < 0

    @property
    def verdict(self) -> Literal["cap", "no significant bend", "beyond the data"]:
        """Whether there is a cap: β is positive by 1.96 standard errors and the peak is among the n measured.

        Gold that falls from the start needs no bend. Its two parameters may both be uncertain while their sum, the
        fall, is not; whether that is significant is for the data to say.
        """
        if self.falls_from_the_start:
            return "cap"
        if self.peak is None or self.beta <= _SIGNIFICANT * self.beta_standard_error:
            return "no significant bend"
        return "cap" if samples_at_kl(self.peak**2) <= self.max_n else "beyond the data"

    @property
    def cap(self) -> int | None:
        """The n of the largest gain by the law; None when the data do not support one (`verdict`)."""
        if self.falls_from_the_start:
            return 1
        if self.verdict != "cap" or self.peak is None:
            return None
        below = math.floor(samples_at_kl(self.peak**2))
        return max((below, below + 1), key=lambda n: self.gain(_kl(n)))


def samples_at_kl(kl: float) -> float:
    """The n >= 1, not a whole number, of log n - (n-1)/n = kl; inf where a float cannot hold it.

    With x = 1/n the equation is x e^{-x} = e^{-(1 + kl)}, which Lambert's W solves.

    Raises:
        ValueError: The KL is negative.
    """
    if kl < 0:
        raise ValueError("a KL is not negative")
    if kl < 1e-12:
        return 1 + math.sqrt(2 * kl)  # At n = 1 the branches of W meet; the KL is (n-1)²/2 there.
    x = -float(lambertw(-math.exp(-(1 + kl))).real)
    return 1 / x if x > 0 else math.inf


def _kl(n: int) -> float:
    return math.log(n) - (n - 1) / n


def _equations(
    gains: FloatArray, standard_errors: FloatArray | None
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    # [points, 2], [points] and the scale of each point, without n = 1.
    if len(gains) < 4:
        raise ValueError("the law needs gains up to n = 4 at least")
    kl = np.array([_kl(n) for n in range(2, len(gains) + 1)])
    design = np.stack((np.sqrt(kl), -kl), axis=1)
    if standard_errors is None:
        return design, gains[1:], None
    scale = standard_errors[1:]
    if not np.all(scale > 0):
        raise ValueError("a standard error is not positive")
    return design / scale[:, None], gains[1:] / scale, scale
