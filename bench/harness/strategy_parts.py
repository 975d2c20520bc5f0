"""The parts of the bench that measure `selection` strategies through the gateway, beside their simulation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from harness.best_of_n_world import World
from harness.report import as_table
from harness.selection_simulation import Simulation
from harness.strategy_costs import Costs, calibrated_loss, gain_lost, matched_ratio, probability_loss, token_ratio

BEST_OF: Final = 8
NUM_TIMED: Final = 40
"""Requests that are asked one after the other for their wall-clock."""


@dataclass(frozen=True, slots=True)
class AdaptivePlan:
    """What is measured of `adaptive`.

    Attributes:
        selection: The object of the request, without `threshold`.
        thresholds: To sweep, increasing.
        cap: `best_of`.
        waves: Sizes of the waves that the simulation plays.
        calibration: Reference rollouts per prompt.
        num_requests: Per prompt and threshold.
    """

    selection: Mapping[str, Any]
    thresholds: Sequence[float]
    cap: int
    waves: Sequence[int]
    calibration: int
    num_requests: int


@dataclass(frozen=True, slots=True)
class RejectPlan:
    """What is measured of `early_reject`: its settings, and requests per prompt and setting."""

    selections: Sequence[Mapping[str, Any]]
    num_requests: int


def measure_adaptive(world: World, plan: AdaptivePlan) -> dict[str, Any]:
    """Sweep the threshold and find the tokens at the mean calibrated reward of best-of-8.

    The calibrators are made by requests that come first, so that `reference_tokens` tells what they cost once and the
    measured requests find them.
    """
    warm = world.ask(1, best_of=1, calibration=plan.calibration)
    references = float(warm.reference_tokens.mean())
    plain = world.ask(plan.num_requests, best_of=BEST_OF, calibration=0)
    settings = [{**plan.selection, "threshold": threshold} for threshold in plan.thresholds]
    sweep = [
        world.ask(plan.num_requests, best_of=plan.cap, calibration=plan.calibration, selection=selection)
        for selection in settings
    ]
    simulation = Simulation(world.pool, cap=max(plan.cap, sum(plan.waves)))
    simulated_plain = simulation.best_of(BEST_OF)
    simulated = [simulation.adaptive(t, plan.waves, plan.calibration) for t in plan.thresholds]
    columns = [("plain", plain.costs(), simulated_plain)]
    columns += [(f"{t:g}", one.costs(), other) for t, one, other in zip(plan.thresholds, sweep, simulated, strict=True)]
    print(_table("threshold", columns))
    found = matched_ratio(plain.costs(), plan.thresholds, [one.costs() for one in sweep])
    expected = matched_ratio(simulated_plain, plan.thresholds, simulated)
    result: dict[str, Any] = {
        "adaptive": [_json(name, costs, other) for name, costs, other in columns],
        "adaptive_references": references,
        "adaptive_token_ratio_simulated": expected and expected[1].to_json(),
        "adaptive_token_ratio": found and found[1].value,
    }
    if found is None:
        print("\nNo threshold reached best-of-8, or all did: there is no token ratio.")
        return result
    there, interval = found
    saved = (1 - interval.value) * float(plain.tokens.mean())
    result |= {
        "adaptive_token_ratio_interval": interval.to_json(),
        "adaptive_threshold": there.setting,
        "adaptive_token_ratio_first_request": interval.value + references / float(plain.tokens.mean()),
        "adaptive_requests_to_break_even": references / saved if saved > 0 else None,
        "adaptive_wall_ratio": _wall_ratio(world, plan, there.setting),
    }
    print(f"\nAt the calibrated reward of best-of-{BEST_OF}: threshold {there.setting:.3f}, tokens {interval}", end="")
    print(f", simulated {expected[1] if expected else 'not reached'}.")
    print(f"Calibrating took {references:.0f} tokens per prompt once: with them the first request of a prompt costs ")
    print(f"{result['adaptive_token_ratio_first_request']:.2f}; they are paid back after ", end="")
    num_requests = result["adaptive_requests_to_break_even"]
    print("no number of requests." if num_requests is None else f"{num_requests:.1f} requests of the prompt.")
    print(f"Wall-clock, one request at a time: {result['adaptive_wall_ratio']:.2f} of best-of-{BEST_OF}'s.")
    return result


def measure_early_reject(world: World, plan: RejectPlan) -> dict[str, Any]:
    """Tokens and reward of every setting against plain best-of-8; the first setting gives the key figures."""
    plain = world.ask(plan.num_requests, best_of=BEST_OF, calibration=0)
    single = world.pool.rewards.mean(axis=1)
    simulation = Simulation(world.pool)
    simulated_plain = simulation.best_of(BEST_OF)
    columns = [("plain", plain.costs(), simulated_plain)]
    rows, measured = [], []
    for selection in plan.selections:
        best_of = int(selection.get("best_of", BEST_OF))
        sent = {key: value for key, value in selection.items() if key != "best_of"}
        outcomes = world.ask(plan.num_requests, best_of=best_of, calibration=0, selection=sent)
        simulated = simulation.early_reject(best_of, float(selection["keep"]), selection["checkpoints"])
        name = f"{best_of}: {selection['keep']:g} at {', '.join(map(str, selection['checkpoints']))}"
        columns.append((name, outcomes.costs(), simulated))
        row: dict[str, Any] = {
            "token_ratio": token_ratio(plain.costs(), outcomes.costs()).to_json(),
            "reward_loss": calibrated_loss(plain.costs(), outcomes.costs()).to_json(),
            "probability_loss": probability_loss(plain.costs(), outcomes.costs()).to_json(),
            "gain_lost": gain_lost(plain.costs(), outcomes.costs(), single).to_json(),
            "token_ratio_simulated": token_ratio(simulated_plain, simulated).to_json(),
            "reward_loss_simulated": calibrated_loss(simulated_plain, simulated).to_json(),
            "probability_loss_simulated": probability_loss(simulated_plain, simulated).to_json(),
            "gain_lost_simulated": gain_lost(simulated_plain, simulated, single).to_json(),
            "wall_ratio": float(np.median(outcomes.wall_s) / np.median(plain.wall_s)),
        }
        measured.append({"selection": dict(selection), **row})
        rows.append([name, *(_shown(row[key]) for key in _REJECT_KEYS), f"{row['wall_ratio']:.2f}"])
    print(_table("candidates: keep at", columns) + "\n")
    print(as_table(["candidates: keep at", *_REJECT_HEADINGS, "wall, many at a time"], rows))
    return {
        "early_reject": measured,
        "early_reject_correlation": {str(at): correlation for at, correlation in world.pool.correlations().items()},
        "early_reject_token_ratio": measured[0]["token_ratio"][0],
        "early_reject_reward_loss": measured[0]["reward_loss"][0],
        "early_reject_probability_loss": measured[0]["probability_loss"][0],
        "early_reject_wall_ratio": measured[0]["wall_ratio"],
    }


_REJECT_KEYS = (
    *("token_ratio", "token_ratio_simulated", "reward_loss", "reward_loss_simulated"),
    *("gain_lost", "gain_lost_simulated", "probability_loss", "probability_loss_simulated"),
)
_REJECT_HEADINGS = (
    *("tokens", "simulated", "lower calibrated reward", "simulated"),
    *("part of the raw gain lost", "simulated", "lower probability", "simulated"),
)


def _wall_ratio(world: World, plan: AdaptivePlan, threshold: float) -> float:
    """Median wall-clock of `adaptive` at a threshold to that of best-of-8, one request at a time, in turns."""
    selection = {**plan.selection, "threshold": threshold}
    walls: dict[str, list[float]] = {"plain": [], "adaptive": []}
    for number in range(NUM_TIMED):
        prompt = world.prompts[number % len(world.prompts)]
        seed = 10**6 + 128 * number
        plain = world.ranked(prompt, seed, BEST_OF, calibration=plan.calibration)
        adaptive = world.ranked(prompt, seed, plan.cap, calibration=plan.calibration, selection=selection)
        walls["plain"].append(world.gateway.one(plain).wall_s)
        walls["adaptive"].append(world.gateway.one(adaptive).wall_s)
    return float(np.median(walls["adaptive"]) / np.median(walls["plain"]))


def _table(heading: str, columns: Sequence[tuple[str, Costs, Costs]]) -> str:
    header = [heading, "calibrated reward", "simulated", "raw reward", "simulated", "tokens", "simulated"]
    body = [
        [
            name,
            *(f"{costs.calibrated.mean():.4f}", f"{simulated.calibrated.mean():.4f}"),
            *(f"{costs.reward.mean():.3f}", f"{simulated.reward.mean():.3f}"),
            *(f"{costs.tokens.mean():.0f}", f"{simulated.tokens.mean():.0f}"),
        ]
        for name, costs, simulated in columns
    ]
    return as_table(header, body)


def _json(name: str, costs: Costs, simulated: Costs) -> dict[str, Any]:
    return {
        "setting": name,
        "calibrated": float(costs.calibrated.mean()),
        "tokens": float(costs.tokens.mean()),
        "calibrated_simulated": float(simulated.calibrated.mean()),
        "tokens_simulated": float(simulated.tokens.mean()),
    }


def _shown(interval: Sequence[float]) -> str:
    value, low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
