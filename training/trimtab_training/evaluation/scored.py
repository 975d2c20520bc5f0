"""Scored samples, and what one side of a comparison makes of them, prompt by prompt."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimtab_training.evaluation.choice_weights import choice_weights, disjoint_choice_weights, wins
from trimtab_training.evaluation.draws import Draws
from trimtab_training.evaluation.procedures import STANDARD, Chosen, Procedure

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scored:
    """Samples of one policy with their rewards.

    Attributes:
        draws: The samples.
        rewards: By name of the reward, each `[prompts, samples]`.
    """

    draws: Draws
    rewards: Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A policy under a procedure.

    Attributes:
        policy: Its name.
        procedure: What is done with its samples.
        scored: The samples: plain ones where the choice among them is worked out here, else chosen ones.
        reward: Name of the reward that chooses.
    """

    policy: str
    procedure: Procedure
    scored: Scored
    reward: str

    @property
    def chosen(self) -> Chosen:
        """What is left to choose among the samples."""
        return self.procedure if isinstance(self.procedure, Chosen) else STANDARD

    @property
    def choosing(self) -> Floats:
        """The rewards that choose, `[prompts, samples]`."""
        return self.scored.rewards[self.reward]

    def mean(self, values: Floats) -> Floats:
        """Mean of something about samples under the choice, unbiased for each prompt.

        Args:
            values: `[prompts, samples]`.

        Returns:
            One number per prompt.
        """
        rows = zip(self.choosing, values, strict=True)
        return np.array([choice_weights(rewards, self.chosen) @ row for rewards, row in rows])


def win_rates(first: Outcome, second: Outcome, by: str, *, is_disjoint: bool) -> Floats:
    """Probability that the first side's choice has the larger reward, ties half: one unbiased estimate per prompt.

    Args:
        first: One side.
        second: The other side.
        by: Name of the reward that judges; choices are made by each side's own.
        is_disjoint: Whether samples of the same index are not independent, so that no pair of choices may have any in
            common.

    Raises:
        ValueError: There are too few samples.
    """
    rates = []
    for i in range(len(first.choosing)):
        won = wins(first.scored.rewards[by][i], second.scored.rewards[by][i])
        if is_disjoint:
            weights = disjoint_choice_weights(first.choosing[i], first.chosen, second.choosing[i], second.chosen)
            rates.append(float((weights * won).sum()))
        else:
            weights = choice_weights(first.choosing[i], first.chosen)
            rates.append(float(weights @ won @ choice_weights(second.choosing[i], second.chosen)))
    return np.array(rates)


def calibrated_histogram(values: Floats, reference: Floats, *, is_disjoint: bool, num_bins: int) -> list[float]:
    """Where rewards stand among the reference policy's rewards for the same prompt: the share of each bin of [0, 1].

    A reward with b of m reference rewards below it and t equal to it spreads its share evenly over
    b/(m+1) .. (b+t+1)/(m+1), its calibrated reward with half ties being (b + t/2) / m. So samples of the reference
    policy fill all bins evenly on average, whatever m and the ties are (Czado, Gneiting and Held 2009).

    Args:
        values: `[prompts, samples]`.
        reference: `[prompts, samples]`.
        is_disjoint: Whether a sample is not compared with the reference's of the same index.
        num_bins: Bins of equal width.
    """
    edges = np.linspace(0, 1, num_bins + 1)
    shares = np.zeros(num_bins)
    for row, others in zip(values, reference, strict=True):
        num_others = len(others) - is_disjoint
        below = (others[None, :] < row[:, None]).astype(np.float64)
        equal = (others[None, :] == row[:, None]).astype(np.float64)
        if is_disjoint:
            np.fill_diagonal(below, 0.0)
            np.fill_diagonal(equal, 0.0)
        low = below.sum(axis=1) / (num_others + 1)
        width = (equal.sum(axis=1) + 1) / (num_others + 1)
        reached = np.clip((edges[None, :] - low[:, None]) / width[:, None], 0, 1)
        shares += np.diff(reached, axis=1).mean(axis=0)
    return [float(share) for share in shares / len(values)]
