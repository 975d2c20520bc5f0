"""Transforms Φ of a calibrated reward: what a policy is rewarded with so that it is best under the procedure deployed.

The policy that maximises the win rate under best-of-N or worst-of-N against KL is the tilt of the reference policy by
e^{Φ(C)/β} (InfAlign, arXiv 2412.19792). The identity is optimal for one sample; the exponential is the paper's own
choice for best-of-N (t > 0) and worst-of-N (t < 0); `OneStep` is the optimum for large β in closed form and loses
little elsewhere; the optimum itself is a table (`optimal.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, get_args

import numpy as np
from scipy.interpolate import PchipInterpolator
from typing_extensions import override

from trimtab_adapters.infalign.unit_interval import FloatArray

MAX_EXPONENT = 500.0
"""Largest |t| of an exponential transform: e^t stays well inside of a float's range."""


class Transform(Protocol):
    """An increasing function of a calibrated reward u in [0, 1]."""

    def __call__(self, u: FloatArray) -> FloatArray:
        """Φ(u), of the shape of `u`."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """Φ(u) = u: optimal for one sample, and what calibration alone does."""

    def __call__(self, u: FloatArray) -> FloatArray:
        """Φ(u), of the shape of `u`."""
        return np.asarray(u, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Logarithm:
    """Φ(u) = log u, -inf at 0: tilting by it with β = 1/(n - 1) is exactly best-of-n.

    Estimates of u are to be `smoothed` first (`estimation_error.py`): an estimate can be 0 where u is not.
    """

    def __call__(self, u: FloatArray) -> FloatArray:
        """Φ(u), of the shape of `u`."""
        with np.errstate(divide="ignore"):
            return np.log(np.asarray(u, dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Exponential:
    """Φ(u) = sign(t) e^{tu}, increasing for either sign of t.

    Attributes:
        t: Not 0; |t| at most `MAX_EXPONENT`. About 2N - 1 for best-of-N and -(2N - 1) for worst-of-N.
        normalised: Map Φ affinely onto [0, 1]. That changes no policy but what β means: with it β is comparable
            between transforms, without it the β of the same policy is |e^t - 1| times as large.
    """

    t: float
    normalised: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.t) and 0 < abs(self.t) <= MAX_EXPONENT):
            raise ValueError(f"t must be a number other than 0 between -{MAX_EXPONENT:g} and {MAX_EXPONENT:g}")

    def __call__(self, u: FloatArray) -> FloatArray:
        """Φ(u), of the shape of `u`."""
        u = np.asarray(u, dtype=np.float64)
        if not self.normalised:
            return math.copysign(1.0, self.t) * np.exp(self.t * u)
        if self.t < 0:
            return np.expm1(self.t * u) / math.expm1(self.t)
        return np.asarray(np.exp(self.t * (u - 1)) * np.expm1(-self.t * u) / math.expm1(-self.t))


@dataclass(frozen=True, slots=True)
class OneStep:
    """The optimal transform for large β: u^(2n-1) for best-of-n, 1 - (1-u)^(2n-1) for worst-of-n.

    It is one step of the fixed point from the reference policy, divided by its value at 1.

    Attributes:
        procedure: For which of the two.
        n: Samples that the procedure draws, >= 1; 1 is the identity.
    """

    procedure: Literal["best_of_n", "worst_of_n"]
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("n must be at least 1")

    def __call__(self, u: FloatArray) -> FloatArray:
        """Φ(u), of the shape of `u`."""
        u = np.asarray(u, dtype=np.float64)
        power = 2 * self.n - 1
        return u**power if self.procedure == "best_of_n" else 1 - (1 - u) ** power


@dataclass(frozen=True)
class Tabulated:
    """A transform known at points of [0, 1], in between by the monotone cubic through them (PCHIP).

    Attributes:
        u: Increasing, from 0 to 1, at least two.
        values: Φ at these points, finite and nowhere decreasing.
    """

    u: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.u) != len(self.values) or len(self.u) < 2:
            raise ValueError("a tabulated transform needs as many values as points, two at least")
        if self.u[0] != 0 or self.u[-1] != 1 or not _increases(self.u, strictly=True):
            raise ValueError("the points of a tabulated transform increase from 0 to 1")
        if not all(map(math.isfinite, self.values)) or not _increases(self.values, strictly=False):
            raise ValueError("the values of a tabulated transform are finite and do not decrease")

    def __call__(self, u: FloatArray) -> FloatArray:
        """Φ(u), of the shape of `u`."""
        return np.asarray(self._interpolant(np.asarray(u, dtype=np.float64)), dtype=np.float64)

    @cached_property
    def _interpolant(self) -> PchipInterpolator:
        return PchipInterpolator(self.u, self.values)

    @override
    def __repr__(self) -> str:
        return f"Tabulated({len(self.u)} points)"


TransformKind = Literal["identity", "log", "exponential", "best_of_n", "worst_of_n"]


def build_transform(kind: str, *, t: float | None = None, n: int | None = None) -> Transform:
    """The transform that a request or a training configuration names by plain values.

    Args:
        kind: One of `TransformKind`; the last two are the one-step closed forms.
        t: Exponent of the exponential, for this kind only; its transform is normalised to [0, 1].
        n: Samples of the procedure, for the one-step closed forms only.

    Raises:
        ValueError: An unknown kind, a value that it needs and lacks or has and does not know, or one out of range.
    """
    if kind not in get_args(TransformKind):
        raise ValueError(f"unknown transform {kind!r}: one of {', '.join(get_args(TransformKind))}")
    if (t is not None) != (kind == "exponential"):
        raise ValueError("t belongs to the exponential transform, which needs it")
    if (n is not None) != (kind in ("best_of_n", "worst_of_n")):
        raise ValueError("n belongs to the transforms best_of_n and worst_of_n, which need it")
    if t is not None:
        return Exponential(t)
    if n is not None:
        return OneStep("best_of_n" if kind == "best_of_n" else "worst_of_n", n)
    return Identity() if kind == "identity" else Logarithm()


def _increases(numbers: Sequence[float], *, strictly: bool) -> bool:
    steps = np.diff(numbers)
    return bool(np.all(steps > 0) if strictly else np.all(steps >= 0))
