"""Best-of-n on a real model and reward against the closed forms: win rate n / (n + 1), KL log n - (n - 1) / n."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.best_of_n_world import World
from harness.order_statistics import (
    binned_kl,
    expected_shares,
    jackknife,
    max_weights,
    rank_histogram,
)
from harness.report import as_table
from trimtab_adapters.contract.best_of_n import best_of_n_kl_upper_bound, best_of_n_win_rate_upper_bound

Floats = NDArray[np.float64]
MAX_BEST_OF = 20
"""What the gateway accepts; beyond it samples stand in for requests."""


def check_theory(world: World, sizes: Sequence[int], num_requests: int, num_bins: int) -> list[dict[str, Any]]:
    """One row per n and source. A win rate and a KL each come with the deviation from theory in standard errors.

    `requests` are real ones: the rank of each winner among all held-out samples of its prompt. `samples` are
    estimates from order statistics: one half of the samples plays the candidates, the other half is held out.

    Args:
        world: Where to ask.
        sizes: The n.
        num_requests: Requests per prompt and n.
        num_bins: Bins of the ranks; their number divides the number of samples per prompt plus one.
    """
    rows = []
    for n in sizes:
        if n <= MAX_BEST_OF:
            outcomes = world.ask(num_requests, stream=n, best_of=n, calibration=0)
            size = world.pool.rewards.shape[1]
            histograms = [
                rank_histogram(_ranks(world.pool.rewards[i], outcomes.reward[i]), size, num_bins)
                for i in range(len(world.prompts))
            ]
            rows.append(_row("requests", n, outcomes.calibrated.mean(axis=1), np.array(histograms), size))
        rows.append(_from_samples(world.pool.rewards, n, num_bins))
    return rows


def theory_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    header = ["n", "source", "win rate", "expected", "z", "KL, binned", "expected", "z", "KL without bins"]
    body = [
        [
            *(str(row["n"]), row["source"], f"{row['win']:.4f} ± {row['win_error']:.4f}"),
            *(f"{row['win_expected']:.4f}", f"{row['win_z']:+.1f}", f"{row['kl']:.3f} ± {row['kl_error']:.3f}"),
            *(
                f"{row['kl_expected']:.3f}",
                "" if row["kl_z"] is None else f"{row['kl_z']:+.1f}",
                f"{row['kl_unbinned']:.3f}",
            ),
        ]
        for row in rows
    ]
    return as_table(header, body)


def _from_samples(rewards: Floats, n: int, num_bins: int) -> dict[str, Any]:
    size = rewards.shape[1] // (2 * num_bins) * num_bins - 1  # so that the bins divide it plus one
    wins, histograms = [], []
    for row in rewards:
        candidates, held_out = np.sort(row[size:]), row[:size]
        weights = max_weights(len(candidates), n)
        ranks = _ranks(held_out, candidates)
        wins.append(float(weights @ ranks) / size)
        histograms.append(rank_histogram(ranks, size, num_bins, weights))
    return _row("samples", n, np.array(wins), np.array(histograms), size)


def _ranks(held_out: Floats, rewards: Floats) -> Floats:
    """How many of the held-out samples score lower, ties half."""
    ordered = np.sort(held_out)
    return np.asarray(
        (np.searchsorted(ordered, rewards, "left") + np.searchsorted(ordered, rewards, "right")) / 2, dtype=np.float64
    )


def _row(source: str, n: int, wins: Floats, histograms: Floats, size: int) -> dict[str, Any]:
    win = jackknife(wins, float)
    expected_win = best_of_n_win_rate_upper_bound(n)
    kl = jackknife(histograms, binned_kl)
    expected_kl = binned_kl(expected_shares(size, n, histograms.shape[1]))
    return {
        "n": n,
        "source": source,
        "win": win.value,
        "win_error": win.error,
        "win_expected": expected_win,
        "win_z": win.z(expected_win),
        "kl": kl.value,
        "kl_error": kl.error,
        "kl_expected": expected_kl,
        # At n = 1 the KL lies on its bound 0, where its deviation is not normal.
        "kl_z": kl.z(expected_kl) if n > 1 else None,
        "kl_unbinned": best_of_n_kl_upper_bound(n),
    }
