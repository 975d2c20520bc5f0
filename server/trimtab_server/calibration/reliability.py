"""How good a calibrator is: are calibrated rewards of samples that took no part in its making uniform?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab_adapters.contract.uniformity import coverage, ks_critical, ks_distance

LEVELS = tuple(round(0.1 * i, 1) for i in range(1, 10))
MAX_VALUES = 5000
"""Of values that go into a report, for a plot."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """Calibrated rewards of held-out samples of the reference policy.

    Attributes:
        num_prompts: Held-out prompts.
        num_rollouts: Held-out rollouts of these.
        ks_distance: Largest distance of the distribution of one rollout per prompt from the uniform one, ties broken at
            random: a test with the critical value beside it, since these are independent.
        ks_critical: What uniform values exceed with a probability of 5 %.
        ks_distance_of_all: The same of all rollouts with half ties, which are what requests get. No test: rollouts of
            one prompt share its errors, and ties keep it away from 0.
        share_tied: Of pairs of rollouts of the same prompt, how many have the same reward.
        coverage: (nominal, measured) share of held-out values not above each level, ties broken at random.
        values: One per held-out prompt, ties broken at random, for a plot; at most `MAX_VALUES`.
    """

    num_prompts: int
    num_rollouts: int
    ks_distance: float
    ks_critical: float
    ks_distance_of_all: float
    share_tied: float
    coverage: list[tuple[float, float]]
    values: list[float]

    @property
    def is_reliable(self) -> bool:
        """Whether the held-out values look uniform at the 5 % level."""
        return self.ks_distance <= self.ks_critical


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out rollouts of one prompt.

    Attributes:
        rewards: Their raw rewards.
        calibrated: Half ties.
        randomised: Ties broken at random.
    """

    rewards: Sequence[float]
    calibrated: Sequence[float]
    randomised: Sequence[float]


def measure(groups: Sequence[HeldOut]) -> Reliability:
    """Judge held-out values, at least one rollout for each of at least one prompt."""
    one_each = [float(group.randomised[0]) for group in groups]
    everything = [float(value) for group in groups for value in group.calibrated]
    randomised = [float(value) for group in groups for value in group.randomised]
    return Reliability(
        num_prompts=len(groups),
        num_rollouts=len(everything),
        ks_distance=ks_distance(one_each),
        ks_critical=ks_critical(len(one_each)),
        ks_distance_of_all=ks_distance(everything),
        share_tied=_share_tied([group.rewards for group in groups]),
        coverage=coverage(randomised, LEVELS),
        values=one_each[:MAX_VALUES],
    )


def _share_tied(groups: Sequence[Sequence[float]]) -> float:
    tied = pairs = 0
    for rewards in groups:
        _, counts = np.unique(np.asarray(rewards), return_counts=True)
        tied += int((counts * (counts - 1)).sum())
        pairs += len(rewards) * (len(rewards) - 1)
    return tied / pairs if pairs else 0.0


def plot_reliability(values: Sequence[float], target: Path, *, title: str) -> None:
    """Draw the distribution function of calibrated rewards against the diagonal.

    95 % of the curves of uniform values lie inside of the band (Dvoretzky, Kiefer and Wolfowitz; Massart's constant).

    Raises:
        OSError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  slow to import, and seldom needed
    from matplotlib.figure import Figure  # noqa: PLC0415

    ordered = np.sort(np.asarray(values, dtype=np.float64))
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    band = float(np.sqrt(np.log(40) / (2 * len(ordered))))
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    line = np.array([0.0, 1.0])
    axes.fill_between(line, line - band, line + band, alpha=0.2, label=f"95 % band, n = {len(ordered)}", linewidth=0)
    axes.plot(line, line, color="black", linewidth=1, label="uniform")
    axes.step([0.0, *ordered, 1.0], [0.0, *shares, 1.0], where="post", label="held-out samples")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title)
    axes.set(xlabel="calibrated reward of a base sample", ylabel="share of samples not above")
    axes.legend(loc="upper left")
    figure.savefig(target, dpi=120)
