"""Coefficients that follow a target: the controllers of Quark and of PPO for language models.

Quark (arXiv 2205.13636) and Ziegler et al. (arXiv 1909.08593): a coefficient is multiplied after each step by
1 ± clip(value / target - 1, ±0.2) · batch / horizon, plus where it punishes the value, minus where it rewards it.
"""

from dataclasses import dataclass

_LARGEST_ERROR = 0.2


@dataclass(slots=True)
class Coefficient:
    """A weight of a term of the loss.

    Attributes:
        value: What it is now.
        target: Value of the term that it steers towards; None keeps it where it is.
        horizon: Rollouts after which a constant error of 1 would have changed it by a factor of about e.
        is_bonus: Whether the term is rewarded (entropy) instead of punished (KL).
    """

    value: float
    target: float | None = None
    horizon: float = 2500.0
    is_bonus: bool = False

    def follow(self, observed: float, num_rollouts: int) -> None:
        """Adapt to the term's mean over `num_rollouts` rollouts; a punished term above target raises the weight."""
        if self.target is None:
            return
        error = min(max(observed / self.target - 1.0, -_LARGEST_ERROR), _LARGEST_ERROR)
        sign = -1.0 if self.is_bonus else 1.0
        self.value *= 1.0 + sign * error * num_rollouts / self.horizon
