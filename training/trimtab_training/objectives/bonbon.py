"""BoNBoN: best-of-n of the base distilled from the best and the worst of n of its outputs.

BoNBoN: Gui, Gârbacea and Veitch, arXiv 2406.00832. The policy that best-of-n draws from has a log-ratio to the base
whose mean difference between the best and the worst of n outputs is known, (n - 1) H_{n-1} with H the harmonic number,
whatever the reward: a quadratic loss (IPO's, with its β fixed by n) brings the policy there, and the likelihood of the
best says which of the policies with that difference is meant. It is offline: only the base is ever drawn from.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab_training.objective_config import BonbonConfig
from trimtab_training.objectives.objective import LossSum, ObjectiveState, ScoredRollout, TokenIds
from trimtab_training.objectives.pair_pool import Pair, PairPool
from trimtab_training.policy import TailoredPolicy


class Bonbon:
    """The objective; its pool of pairs may grow at any time, and it never asks for more.

    Args:
        config: n and the weight of the likelihood.
        prefix: What the adapter sees before every prompt.
        seed: Of the pool's shuffling.
    """

    name = "bonbon"
    is_on_policy = False
    learns_from_base = True
    wants_round = False
    token_mask = None

    def __init__(self, config: BonbonConfig, *, prefix: TokenIds, seed: int) -> None:
        self.prefix = prefix
        self._config = config
        self._pool = PairPool(seed=seed)

    @property
    def num_rollouts(self) -> int:
        """Two for each pair of the pool."""
        return 2 * len(self._pool)

    def add(self, rollouts: Sequence[ScoredRollout], policy: TailoredPolicy) -> Mapping[str, float]:
        """Add the pair of each prompt.

        A prompt whose n outputs all earned the same has no better and no worse; one with another number of readable
        outputs than n has another best-of-n. Both are left out and counted.
        """
        groups: dict[int, list[ScoredRollout]] = defaultdict(list)
        for rollout in rollouts:
            groups[rollout.group].append(rollout)
        complete = [group for group in groups.values() if len(group) == self._config.n]
        pairs = [pair for group in complete if (pair := pair_of(group)) is not None]
        self._pool.add(pairs)
        return {
            "num_pairs": float(len(self._pool)),
            "num_ties": float(len(complete) - len(pairs)),
            "num_incomplete": float(len(groups) - len(complete)),
        }

    def next_rows(self, num_rows: int) -> list[Pair]:
        """The next pairs of the shuffled pool."""
        return self._pool.draw(num_rows)

    def loss(self, policy: TailoredPolicy, rows: Sequence[Pair]) -> LossSum:
        """`bonbon_loss`, summed over pairs."""
        output = policy.forward(
            [pair.prompt_token_ids for pair in rows] * 2,
            [pair.best_token_ids for pair in rows] + [pair.worst_token_ids for pair in rows],
            [self.prefix] * (2 * len(rows)),
        )
        # The base's distribution is there anyway: without it the tailored policy has none.
        steered, base = (logprobs.sum(dim=-1) for logprobs in output.token_logprobs())
        log_ratios = steered - base
        differences = log_ratios[: len(rows)] - log_ratios[len(rows) :]
        return bonbon_loss(
            steered[: len(rows)], differences, n=self._config.n, likelihood_weight=self._config.likelihood_weight
        )

    def after_step(self, figures: Mapping[str, float]) -> None:
        """Nothing adapts."""

    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """None besides the adapter's."""
        return ()

    def state(self) -> ObjectiveState:
        """The pool and where in it the run is."""
        return self._pool.state()

    def load_state(self, state: ObjectiveState) -> None:
        """See `Objective`."""
        self._pool.load_state(state)

    def describe(self) -> dict[str, Any]:
        """The pool's size."""
        return {"num_pairs": len(self._pool)}


def pair_of(group: Sequence[ScoredRollout]) -> Pair | None:
    """The best and the worst of a prompt's outputs, the first of equals; None where all earned the same."""
    best, worst = max(group, key=lambda r: r.reward), min(group, key=lambda r: r.reward)
    if best.reward == worst.reward:
        return None
    return Pair(best.prompt_token_ids, best.output_token_ids, worst.output_token_ids)


def log_ratio_difference(n: int) -> float:
    """(n - 1) H_{n-1}: what best-of-n's log-ratio to the base has more, in the mean, at the best than at the worst.

    Half its reciprocal is the β_n of the paper.
    """
    return (n - 1) * sum(1.0 / i for i in range(1, n))


def bonbon_loss(best_logprobs: Tensor, differences: Tensor, *, n: int, likelihood_weight: float) -> LossSum:
    """Sum over pairs of -w log π(best) + (1 - w) (h - (n - 1) H_{n-1})².

    Args:
        best_logprobs: `[B]`, of whole outputs under the policy.
        differences: `[B]`, h: log-ratio of policy to base of the best less that of the worst.
        n: Outputs of which these are the best and the worst.
        likelihood_weight: w.
    """
    nll = -best_logprobs.sum()
    preference = (differences - log_ratio_difference(n)).square().sum()
    figures = {
        "nll": float(nll.detach()),
        "preference": float(preference.detach()),
        "log_ratio_difference": float(differences.detach().sum()),
    }
    return LossSum(likelihood_weight * nll + (1.0 - likelihood_weight) * preference, len(differences), figures)
