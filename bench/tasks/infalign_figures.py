"""Win rates of trained policies under an inference-time procedure, at equal KL. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.figures import Floats, Interval
from trimtab_adapters.infalign.matched_kl import optimum_at_kl, tilt_at_kl
from trimtab_adapters.infalign.procedures import Procedure, ProcedureKind
from trimtab_adapters.infalign.transforms import Identity
from trimtab_training.evaluation.choice_weights import choice_weights, wins
from trimtab_training.evaluation.procedures import Chosen


@dataclass(frozen=True, slots=True)
class Trained:
    """One trained policy on the held-out prompts.

    Attributes:
        transform: Of the reward that it was trained on.
        kl: Sum over an output of KL(policy || base), mean over outputs, `[prompts]`, nats.
        win_rate: Under the procedure, against the base under the same, `[prompts]`.
    """

    transform: str
    kl: Floats
    win_rate: Floats


def win_rates(chosen: Chosen, choose_by: Floats, judge: Floats, base_choose_by: Floats, base_judge: Floats) -> Floats:
    """P[the policy's choice beats the base's] per prompt, ties half: over all subsets of both pools.

    Args:
        chosen: Best or worst of n.
        choose_by: What the procedure ranks by, `[prompts, samples]`.
        judge: What decides who wins, likewise.
        base_choose_by: Of the base's samples.
        base_judge: Likewise.
    """
    rows = []
    for own, verdict, other, other_verdict in zip(choose_by, judge, base_choose_by, base_judge, strict=True):
        rows.append(choice_weights(own, chosen) @ wins(verdict, other_verdict) @ choice_weights(other, chosen))
    return np.array(rows)


def at_kl(points: Sequence[tuple[float, float]], kl: float) -> float:
    """Win rate at a KL between trained policies: linear in the square root of the KL, from the base at (0, 1/2).

    A small move wins in proportion to its length, and KL grows with the square of that. Not beyond the largest KL.
    """
    known = sorted([(0.0, 0.5), *points])
    return float(np.interp(np.sqrt(kl), np.sqrt([max(0.0, p[0]) for p in known]), [p[1] for p in known]))


def matched_differences(
    policies: Sequence[Trained], first: str, second: str, kl: float, *, seed: int, num_resamples: int = 2000
) -> tuple[Interval, Interval, Interval]:
    """Win rates of two transforms at a KL and their difference, with 95 % intervals over prompts, paired."""
    num_prompts = len(policies[0].kl)
    rng = np.random.default_rng([seed, 11])
    resamples = np.vstack([np.arange(num_prompts), rng.integers(0, num_prompts, (num_resamples, num_prompts))])

    def curve(name: str) -> Floats:
        mine = [policy for policy in policies if policy.transform == name]
        kls = np.array([policy.kl[resamples].mean(axis=1) for policy in mine])
        rates = np.array([policy.win_rate[resamples].mean(axis=1) for policy in mine])
        return np.array([at_kl(list(zip(k, w, strict=True)), kl) for k, w in zip(kls.T, rates.T, strict=True)])

    one, other = curve(first), curve(second)
    return _interval(one), _interval(other), _interval(one - other)


def largest_common_kl(policies: Sequence[Trained]) -> float:
    """The largest KL that every transform has reached."""
    reached: dict[str, float] = {}
    for policy in policies:
        reached[policy.transform] = max(reached.get(policy.transform, 0.0), float(policy.kl.mean()))
    return min(reached.values())


def theory_at_kl(kind: ProcedureKind, n: int, kl: float) -> Mapping[str, float]:
    """Exact win rates at a KL on the calibrated scale: of the optimum, of the tilt by the calibrated reward itself."""
    procedure = Procedure(kind, n)
    return {
        "optimal": optimum_at_kl(procedure, kl).win_rate,
        "calibrated": procedure.win_rate(tilt_at_kl(Identity(), kl).ranks),
    }


def _interval(values: Floats) -> Interval:
    """Of the first value; the others are resamples."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))
