"""InfAlign on real data: policies trained for best-of-n and worst-of-n, against the base under the same procedure.

    python bench/tasks/infalign.py --task dialogue-safety --json infalign.json

Each transform of the reward (raw, calibrated, exponential, optimal) is trained at several KL weights, those at which
theory expects the KLs of `--kls` from it. Win rates are compared at equal KL, by interpolation between the trained
policies, beside what is exact on the calibrated scale. Held-out prompts; the procedure chooses by the reward, and both
the reward and a judge that nothing was trained on decide who wins.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of `harness` and `tasks`

import numpy as np

from harness.report import as_table, describe_machine
from tasks.infalign_figures import Trained, largest_common_kl, matched_differences, theory_at_kl, win_rates
from tasks.outcomes import Outcomes
from tasks.plan import TASKS, plan_for
from tasks.systems import World, build_world
from trimtab_adapters.infalign.matched_kl import optimum_at_kl, tilt_at_kl
from trimtab_adapters.infalign.procedures import Procedure, ProcedureKind
from trimtab_adapters.infalign.transforms import Exponential, Identity
from trimtab_training.evaluation.procedures import Chosen
from trimtab_training.transforms import exponent

TRANSFORMS: Final = ("raw", "calibrated", "exponential", "optimal")
_UNIFORM_SD: Final = 12**-0.5
"""Of calibrated rewards of the base's own samples."""


def kl_weight(transform: str, procedure: Procedure, kl: float, reward_sd: float) -> float:
    """The weight at which theory expects a KL from a transform.

    Raw rewards are taken for calibrated ones with another standard deviation: `reward_sd`, within prompts.
    """
    if transform == "optimal":
        return optimum_at_kl(procedure, kl).beta
    if transform == "exponential":
        return tilt_at_kl(Exponential(exponent(procedure.kind, procedure.n)), kl).beta
    weight = tilt_at_kl(Identity(), kl).beta
    return weight * reward_sd / _UNIFORM_SD if transform == "raw" else weight


def trained_for(
    world: World, transform: str, procedure: Procedure, kl_coef: float, *, num_reference: int, seed: int
) -> Outcomes:
    """Outcomes of the policy trained with a transform and a KL weight."""
    settings: dict[str, Any] = {"kind": transform, "num_reference": num_reference}
    if transform in ("exponential", "optimal"):
        settings |= {"procedure": procedure.kind, "n": procedure.n}
    if transform == "raw":
        settings = {"kind": "raw"}
    plan = replace(world.plan, transform=settings, objective={**world.plan.objective, "kl_coef": kl_coef})
    own = replace(world, plan=plan)
    policy, prefix, _ = own.trained_policy("ipa", seed)
    return own.measured(policy, prefix, seed)


def measure(world: World, kind: ProcedureKind, options: argparse.Namespace, base: Outcomes) -> dict[str, Any]:
    """All transforms under one procedure."""
    procedure = Procedure(kind, options.n)
    chosen = Chosen("best" if kind == "best_of_n" else "worst", options.n)
    reward_sd = float(base.scores["reward"].std(axis=1).mean())
    policies: dict[str, list[Trained]] = {"reward": [], "judge": []}
    rows = []
    for transform in options.transforms:
        for kl in options.kls:
            began = time.perf_counter()
            weight = kl_weight(transform, procedure, kl, reward_sd)
            found = trained_for(
                world, transform, procedure, weight, num_reference=options.references, seed=options.seed
            )
            assert found.kl is not None, "a policy that draws has a KL"
            row = {"transform": transform, "kl_coef": weight, "expected_kl": kl, "kl": float(found.kl.mean())}
            for decides, kept in policies.items():
                rates = win_rates(
                    chosen,
                    found.scores["reward"],
                    found.scores[decides],
                    base.scores["reward"],
                    base.scores[decides],
                )
                kept.append(Trained(transform, found.kl.mean(axis=1), rates))
                row[f"win_rate_{decides}"] = float(rates.mean())
            rows.append(row)
            _say(f"{kind} {json.dumps(row)} {time.perf_counter() - began:.0f} s")
    result: dict[str, Any] = {"policies": rows, "reward_sd": reward_sd}
    for decides, kept in policies.items():
        result[decides] = _matched(kept, options)
    common = largest_common_kl(policies["reward"])
    result["theory"] = {"kl": common, **theory_at_kl(kind, options.n, common)}
    return result


def _matched(policies: list[Trained], options: argparse.Namespace) -> dict[str, Any]:
    kl = largest_common_kl(policies)
    found: dict[str, Any] = {"kl": kl}
    for ctrl in ("exponential", "optimal"):
        for other in ("calibrated", "raw"):
            if ctrl in options.transforms and other in options.transforms:
                one, two, difference = matched_differences(policies, ctrl, other, kl, seed=options.seed)
                found[ctrl], found[other] = one.as_list(), two.as_list()
                found[f"{ctrl} - {other}"] = difference.as_list()
    return found


def main(argv: list[str]) -> int:
    options = _parse(argv)
    plan = plan_for(options.task, quick=True, overrides={"num_samples": options.samples, **dict(options.set)})
    world = build_world(
        options.task, plan, data=options.data, base=options.base, start=options.start, num_threads=options.threads
    )
    base = world.base_outcomes(options.seed + 1)  # other random numbers than the policies' samples, or they go together
    result: dict[str, Any] = {
        "task": options.task,
        "machine": describe_machine(),
        "plan": plan.described(),
        "n": options.n,
        "num_held_out_prompts": len(world.prompts),
    }
    for kind in options.procedures:
        result[kind] = measure(world, kind, options, base)
        if options.json:  # after each part: a later one may take long
            options.json.write_text(json.dumps(result, indent=1) + "\n")
        _print(kind, result[kind])
    return 0


def _print(kind: str, result: dict[str, Any]) -> None:
    print(f"\n## {kind}\n")
    header = ["transform", "weight", "KL expected", "KL", "win rate, reward", "win rate, judge"]
    keys = ("kl_coef", "expected_kl", "kl", "win_rate_reward", "win_rate_judge")
    print(as_table(header, [[r["transform"], *(f"{r[key]:.3f}" for key in keys)] for r in result["policies"]]))
    for decides in ("reward", "judge"):
        told = {k: [round(v, 3) for v in np.atleast_1d(v).tolist()] for k, v in result[decides].items()}
        print(f"\nat equal KL, by the {decides}: {json.dumps(told)}")
    print(f"theory: {json.dumps({k: round(v, 4) for k, v in result['theory'].items()})}", flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="dialogue-safety")
    parser.add_argument("--procedures", type=_names, default=["best_of_n", "worst_of_n"])
    parser.add_argument("--transforms", type=_names, default=list(TRANSFORMS))
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--kls", type=_numbers, default=[0.1, 0.4, 1.0], help="nats per output that theory expects")
    parser.add_argument("--samples", type=int, default=16, help="per held-out prompt")
    parser.add_argument("--references", type=int, default=64, help="of the base per training prompt, to calibrate")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--base", type=Path, default=Path("../shared/models/base7m"))
    parser.add_argument("--start", type=Path, default=Path("../shared/models/small2m"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", type=_setting, action="append", default=[], help="a setting of the plan, name=JSON")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
