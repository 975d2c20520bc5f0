"""How far choosing among n samples moves a policy: KL(best-of-n of pi || pi), with ties."""

import numpy as np
from numpy.typing import NDArray

from trimtab_training.evaluation.procedures import Chosen

Floats = NDArray[np.float64]


def selection_kl(rewards: Floats, chosen: Chosen) -> float:
    """KL between the choice among n samples and one sample, in nats, from a pool of samples of one prompt.

    Ties are broken at random, so an output whose reward has probability F - G is chosen (F^n - G^n) / (F - G) times as
    often, G and F being the cumulative probabilities below and up to its reward. F and G are taken from the pool.
    A reward that the pool has once is treated as a piece of a continuous distribution; one that it has several times as
    an atom. Without ties this is log n - (n - 1) / n exactly, with ties it is less; a rare atom seen once makes it too
    large, never too small on that account.

    Args:
        rewards: Of the pool, `[m]`; n may be larger than m.
        chosen: The best or the worst of n, which cost the same on mirrored rewards.
    """
    n = chosen.n
    signed = rewards if chosen.extreme == "best" else -rewards
    _, counts = np.unique(signed, return_counts=True)
    up_to = np.cumsum(counts) / len(rewards)
    below = up_to - counts / len(rewards)
    below[0] = 0.0
    mass = up_to**n - below**n
    atoms = mass * np.log(np.where(mass > 0, mass, 1.0) / (up_to - below))
    pieces = np.log(n) * mass + (n - 1) * (_moment(up_to, n) - _moment(below, n))
    return float(np.where(counts > 1, atoms, pieces).sum())


def _moment(u: Floats, n: int) -> Floats:
    """The integral of n v^(n-1) log v over v from 0 to u: u^n (log u - 1/n)."""
    return np.asarray(np.where(u > 0, u**n * (np.log(np.where(u > 0, u, 1.0)) - 1 / n), 0.0))
