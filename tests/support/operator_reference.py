"""The operators of a steering once more, by definition and in float64, to check the engine's own against.

Nothing here is taken from `trimtab_adapters.operators`: the mask compares probabilities, the cap is found by bisection.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float64]

KL_SLACK = 1e-3
"""How far below its cap an engine may end its search, as a fraction; it may never end above."""
KL_NOISE = 5e-6
"""Nats by which a KL in float32 may be wrong: it is a difference of log-sum-exps of logits around 10, whose last digit
is 1e-6."""
_NUM_HALVINGS = 24


@dataclass(frozen=True)
class Operators:
    """What a request asks for beside its terms; the fields of `AlphaSchedule` and `SteeringOperators`."""

    start: int = 0
    first: int | None = None
    decay: float = 1.0
    plausibility: float | None = None
    max_kl: float | None = None

    def factor(self, num_outputs: int) -> float:
        """What multiplies alpha at the token after so many outputs."""
        end = float("inf") if self.first is None else self.start + self.first
        return self.decay ** (num_outputs - self.start) if self.start <= num_outputs < end else 0.0

    def is_over(self, num_outputs: int) -> bool:
        """Whether nothing will act again."""
        return self.first is not None and num_outputs >= self.start + self.first


def plausible(base_logits: Rows, fraction: float) -> Rows:
    """`[V]` logits with minus infinity where the probability is below `fraction` of the largest."""
    ratios = np.exp(base_logits - base_logits.max())
    return np.where(ratios < fraction, -np.inf, base_logits)


def scale_bounds(base_logits: Rows, added: Rows, max_kl: npt.ArrayLike) -> tuple[Rows, Rows]:
    """The smallest and the largest scale, each `[R]`, that an engine may give to what a steering adds.

    Args:
        base_logits: `[R, V]`, minus infinity allowed.
        added: `[R, V]`.
        max_kl: `[R]` caps in nats.
    """
    caps = np.asarray(max_kl, dtype=np.float64)
    both = np.concatenate((caps * (1 - KL_SLACK) - KL_NOISE, caps + KL_NOISE))
    low, high = np.split(_largest_scale(np.tile(base_logits, (2, 1)), np.tile(added, (2, 1)), both), 2)
    return low, high


def _largest_scale(base_logits: Rows, added: Rows, caps: Rows) -> Rows:
    """By bisection: KL grows along the path."""
    low, high = np.zeros(len(caps)), np.ones(len(caps))
    fits = _kl(base_logits, added, high) <= caps
    for _ in range(0 if fits.all() else _NUM_HALVINGS):
        middle = (low + high) / 2
        is_below = _kl(base_logits, added, middle) <= caps
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return np.where(fits, 1.0, low)


def _kl(base_logits: Rows, added: Rows, scale: Rows) -> Rows:
    """KL(softmax(b + s d) || softmax(b)), `[R]`."""
    moved = _log_softmax(base_logits + scale[:, None] * added)
    with np.errstate(invalid="ignore"):
        ratio = moved - _log_softmax(base_logits)
    probability = np.exp(moved)
    return np.asarray(np.where(probability > 0, probability * ratio, 0.0).sum(axis=-1))


def _log_softmax(logits: Rows) -> Rows:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
