"""Selection strategies played through on samples that are there already: what they should give, apart from any server.

Letters: P prompts, M samples each. Every play takes candidates of one prompt at random without putting back; the same
seed gives all strategies the same candidates in the same order. Rewards are calibrated against all M samples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import rankdata

from harness.sample_pool import RewardPool
from harness.strategy_costs import Costs

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class Simulation:
    """Plays strategies on one pool.

    Args:
        pool: Samples with their rewards.
        num_plays: Per prompt.
        cap: Most candidates of one play.
        seed: Of the candidates.
    """

    def __init__(self, pool: RewardPool, *, num_plays: int = 200, cap: int = 20, seed: int = 0) -> None:
        self._pool = pool
        self._generator = np.random.default_rng(seed)
        num_prompts, size = pool.rewards.shape
        self._calibrated = (rankdata(pool.rewards, axis=1) - 0.5) / size
        shuffled = self._generator.random((num_prompts, num_plays, size)).argpartition(cap, axis=2)
        self._candidates: Indices = shuffled[:, :, :cap]

    def best_of(self, num: int) -> Costs:
        """Best of `num`."""
        return self._played(np.ones((*self._candidates.shape[:2], num), dtype=bool))

    def adaptive(self, threshold: float, waves: Sequence[int], references: int) -> Costs:
        """Waves of candidates until one of them reaches a threshold on the calibrated reward.

        Args:
            threshold: Of the calibrated reward.
            waves: Sizes of the waves; their sum is the cap.
            references: Size of the calibrator, whose samples are drawn apart; 0 for one without error.
        """
        cap = sum(waves)
        seen = self._estimates(cap, references)
        is_used = np.zeros(seen.shape, dtype=bool)
        going = np.ones(seen.shape[:2], dtype=bool)
        begin = 0
        for size in waves:
            end = begin + size
            is_used[:, :, begin:end] = going[:, :, None]
            going &= (seen[:, :, begin:end] < threshold).all(axis=2)
            begin = end
        return self._played(is_used)

    def early_reject(self, num: int, keep: float, checkpoints: Sequence[int]) -> Costs:
        """Candidates at once; at each checkpoint the better part of them by partial reward goes on.

        Args:
            num: Candidates at the start.
            keep: Share that goes on at each checkpoint, at least one candidate.
            checkpoints: Numbers of tokens, for each of which the pool has partial rewards.
        """
        alive = np.ones((*self._candidates.shape[:2], num), dtype=bool)
        lengths = self._of(self._pool.lengths, num)
        spent = lengths
        num_alive = num
        for checkpoint in checkpoints:
            num_alive = max(1, round(keep * num_alive))
            partial = np.where(alive, self._of(self._pool.partial[checkpoint], num), -np.inf)
            order = np.argsort(-partial, axis=2, kind="stable")
            kept = np.zeros_like(alive)
            np.put_along_axis(kept, order[:, :, :num_alive], values=True, axis=2)
            spent = np.where(alive & ~kept, np.minimum(spent, checkpoint), spent)
            alive = kept
        return self._played(alive, spent.sum(axis=2))

    def _estimates(self, num: int, references: int) -> Floats:
        """Calibrated rewards of the first candidates as a calibrator of some references would give them."""
        if references == 0:
            return self._of(self._calibrated, num)
        rewards = self._of(self._pool.rewards, num)
        num_prompts, size = self._pool.rewards.shape
        drawn = self._generator.integers(0, size, (num_prompts, rewards.shape[1], references))
        known = np.take_along_axis(self._pool.rewards[:, None, :], drawn, axis=2)[:, :, None, :]
        below, not_above = known < rewards[..., None], known <= rewards[..., None]
        return np.asarray((below.mean(axis=3) + not_above.mean(axis=3)) / 2, dtype=np.float64)

    def _of(self, values: Floats | Indices, num: int) -> Floats:
        """Values of the first candidates of each play, `[prompts, plays, num]`."""
        wide = values.astype(np.float64)[:, None, :]
        return np.take_along_axis(wide, self._candidates[:, :, :num], axis=2)

    def _played(self, is_used: NDArray[np.bool_], tokens: Floats | None = None) -> Costs:
        num = is_used.shape[2]
        best = np.where(is_used, self._of(self._pool.rewards, num), -np.inf).argmax(axis=2)[:, :, None]
        if tokens is None:
            tokens = np.where(is_used, self._of(self._pool.lengths, num), 0).sum(axis=2)

        def chosen(values: Floats) -> Floats:
            picked = np.take_along_axis(self._of(values, num), best, axis=2)
            return np.asarray(picked[:, :, 0].mean(axis=1), dtype=np.float64)

        return Costs(
            calibrated=chosen(self._calibrated),
            reward=chosen(self._pool.rewards),
            probability=chosen(expit(self._pool.rewards)),
            tokens=np.asarray(tokens.mean(axis=1), dtype=np.float64),
        )
