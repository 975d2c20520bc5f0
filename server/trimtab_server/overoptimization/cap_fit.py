"""From pools of scored samples to a cap for N. Pure."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab_adapters.contract.errors import ConflictError
from trimtab_adapters.contract.selection_cap import SelectionCap, SelectionCurvePoint, Verdict
from trimtab_adapters.infalign.overoptimization import OveroptimizationLaw
from trimtab_adapters.infalign.selection_curve import best_of_n_gold, selection_curve
from trimtab_adapters.infalign.unit_interval import FloatArray

MIN_PROMPTS = 20
"""An interval over fewer prompts means little."""
MIN_SAMPLES = 4
"""Of a prompt: the law has two parameters and nothing to say about n = 1, so n must reach 4."""
MAX_N = 64
_SIGNIFICANT = 1.959963984540054  # One-sided 2.5 %.


@dataclass(frozen=True, slots=True)
class ScoredPool:
    """Both rewards of independent samples of one policy for one prompt, in the same order."""

    prompt_key: str
    proxy: Sequence[float]
    gold: Sequence[float]


def choose_max_n(largest_pools: Sequence[int]) -> int:
    """The largest n of the curve: each point is about the same prompts, those with pools of at least this size.

    As many as half of the prompts that are of use at all, and no fewer than `MIN_PROMPTS`, reach it.

    Args:
        largest_pools: Size of the largest pool of each prompt.

    Raises:
        ConflictError: Too few prompts have enough samples.
    """
    sizes = sorted((size for size in largest_pools if size >= MIN_SAMPLES), reverse=True)
    if len(sizes) < MIN_PROMPTS:
        raise ConflictError(
            f"there is too little data for a curve: it takes {MIN_PROMPTS} prompts with {MIN_SAMPLES} samples of one "
            f"policy each, and the log has {len(sizes)} such prompts; best-of-N requests and calibrated rewards log "
            "them",
            code="too_little_data",
        )
    return min(MAX_N, sizes[max(MIN_PROMPTS, math.ceil(len(sizes) / 2)) - 1])


def fit_selection_cap(
    pools: Sequence[ScoredPool],
    max_n: int,
    *,
    proxy: str,
    gold: str,
    base_model: str,
    created_at: float,
    num_rollouts: int,
    left_out: Mapping[str, int],
    route: str | None = None,
) -> SelectionCap:
    """Average best-of-n over prompts, fit the law, and see whether it supports a cap.

    Several pools of one prompt count as one prompt: its estimate is their mean.

    Args:
        pools: Each with at least `max_n` samples; two prompts at least.
        max_n: Largest n of the curve, at least `MIN_SAMPLES`.
        proxy: `name@version` of the reward that chooses.
        gold: `name@version` of the reward that is trusted more.
        base_model: Whose samples these are.
        created_at: Unix time in seconds.
        num_rollouts: Rollouts that were read.
        left_out: How many of them are in no pool, by reason.
        route: The only route whose samples these are.
    """
    rows = defaultdict(list)
    for pool in pools:
        rows[pool.prompt_key].append(best_of_n_gold(pool.proxy, pool.gold, max_n))
    per_prompt = np.array([np.mean(estimates, axis=0) for estimates in rows.values()])
    law = OveroptimizationLaw.fit_prompts(per_prompt)
    verdict: Verdict = law.verdict
    # The law is concave: fitted to a gold reward that only levels off it peaks, too. Falling must be seen in the data.
    if law.cap is not None and not _falls_behind(per_prompt, law.cap):
        verdict = "no significant fall"
    return SelectionCap(
        proxy=proxy,
        gold=gold,
        base_model=base_model,
        num_prompts=len(rows),
        num_samples=sum(len(pool.proxy) for pool in pools),
        num_rollouts=num_rollouts,
        left_out=dict(left_out),
        curve=[
            SelectionCurvePoint(
                n=point.n,
                kl=point.kl,
                gold=point.gold,
                gold_low=point.gold_low,
                gold_high=point.gold_high,
                gain=point.gain,
                gain_standard_error=point.gain_standard_error,
            )
            for point in selection_curve(per_prompt)
        ],
        alpha=law.alpha,
        alpha_standard_error=law.alpha_standard_error,
        beta=law.beta,
        beta_standard_error=law.beta_standard_error,
        verdict=verdict,
        cap=law.cap if verdict == "cap" else None,
        route=route,
        created_at=created_at,
    )


def _falls_behind(per_prompt: FloatArray, n: int) -> bool:
    # Whether the best of n has significantly more gold than the best of the largest n, compared within prompts.
    fall = per_prompt[:, n - 1] - per_prompt[:, -1]
    return bool(fall.mean() > _SIGNIFICANT * fall.std(ddof=1) / math.sqrt(len(fall)))
