"""Choices that follow the tilted reference policy: exp(transform(C) / beta), with C the calibrated reward.

Without any training this serves the policy that InfAlign's CTRL trains for (arXiv 2412.19792), as well as N candidates
can: `soft` with a bias that falls as 1/N, `rejection` exactly while candidates last.
"""

import math
from collections.abc import Sequence
from random import Random

import numpy as np

from trimtab_adapters.contract.selection import Rejection, Soft, TiltedSelection
from trimtab_adapters.infalign.estimation_error import smoothed
from trimtab_adapters.infalign.transforms import build_transform
from trimtab_server.decoding.candidates import Scored, in_given_order, ranked
from trimtab_server.decoding.job import PromptResult
from trimtab_server.decoding.prompt_run import PromptRun

_TINY = 1e-300


def log_weights(params: TiltedSelection, scored: Sequence[Scored]) -> list[float]:
    """(transform(C) - transform(1)) / beta of each candidate, at most 0.

    Estimates go through (K C + 1/2) / (K + 1), K being the number of reference rollouts, where the transform has no
    finite value at 0.
    """
    transform = build_transform(**params.transform.model_dump(exclude_none=True))
    is_finite_at_0 = math.isfinite(transform(np.array(0.0)).item())
    calibrated = []
    for _, value in scored:
        if value is None or value.calibrated is None:
            raise ValueError("a tilted choice needs calibrated rewards")
        size = value.calibration_size or 1
        calibrated.append(value.calibrated if is_finite_at_0 else smoothed(value.calibrated, size))
    top = transform(np.array(1.0)).item()
    return [(x - top) / params.beta for x in transform(np.array(calibrated, dtype=np.float64)).tolist()]


async def soft(run: PromptRun, params: Soft) -> PromptResult:
    """All N candidates; the choices are drawn among them by weight, without replacement."""
    scored = await run.score(await run.generate(range(run.num_candidates)))
    order = _by_lot(scored, log_weights(params, scored), run.n, run.dice("soft"))
    return PromptResult(in_given_order(order), outcome=_described(params))


async def rejection(run: PromptRun, params: Rejection) -> PromptResult:
    """Draw until as many candidates are accepted as there are choices, at most N.

    The first accepted ones by number are the choices and each wave is drawn to its end, so that neither length nor
    speed of a candidate matters: each choice is a sample of the tilted policy.
    """
    dice = run.dice("rejection")
    accepted: list[Scored] = []
    rejected: list[Scored] = []
    num_started = 0
    while num_started < run.num_candidates and len(accepted) < run.n:
        end = min(num_started + max(params.wave, run.n - len(accepted)), run.num_candidates)
        drawn = await run.score(await run.generate(range(num_started, end)))
        num_started = end
        for item, weight in zip(drawn, log_weights(params, drawn), strict=True):
            (accepted if math.log(1 - dice.random()) <= weight else rejected).append(item)
    num_missing = max(0, run.n - len(accepted))
    first = accepted[: run.n] + _by_lot(rejected, log_weights(params, rejected), num_missing, run.dice("soft"))
    chosen = first[: run.n]
    rest = [s.candidate.index for s in ranked(accepted + rejected)]
    others = [item for item in accepted + rejected if all(item[0] is not choice[0] for choice in chosen)]
    others.sort(key=lambda item: rest.index(item[0].index))
    outcome = {**_described(params), "num_accepted": len(accepted), "is_exact": num_missing == 0}
    return PromptResult(in_given_order(chosen + others), outcome=outcome)


def _by_lot(scored: Sequence[Scored], weights: Sequence[float], num: int, dice: Random) -> list[Scored]:
    """`num` of them drawn by weight without replacement, in the order of drawing, then the others, best first.

    Adding Gumbel noise to log-weights and taking the largest sums draws so (arXiv 1903.06059).
    """
    noisy = [weight - math.log(max(dice.expovariate(1.0), _TINY)) for weight in weights]
    order = sorted(range(len(scored)), key=lambda i: -noisy[i])
    drawn = [scored[i] for i in order[:num]]
    by_index = {item[0].index: item for item in scored}
    rest = [by_index[s.candidate.index] for s in ranked([scored[i] for i in order[num:]])]
    return drawn + rest


def _described(params: TiltedSelection) -> dict[str, object]:
    return {"transform": params.transform.model_dump(exclude_none=True), "beta": params.beta}
