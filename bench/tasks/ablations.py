"""What the papers left open, on real data at equal compute: objectives, sizes, and approximate policies.

    python bench/tasks/ablations.py --part objectives --tasks toxicity,keywords --json objectives.json
    python bench/tasks/ablations.py --part sizes --starts SMALL,SMALLER --bases BASE,LARGER --json sizes.json
    python bench/tasks/ablations.py --part approximate --json approximate.json

    objectives    Quark, PPO, NLPO and RLOO with the same rollouts, steps and learning rate; `--kinds quark-plain` is
                  Quark without its entropy bonus
    sizes         every adapter LM on every base: gain, and what the adapter adds to the time of a decoding step
    approximate   adapters trained against something else than the base that they are measured with (a smaller model,
                  that one distilled, a student of random weights, and those of `--approximate`), beside its fidelity:
                  the mean log-ratio per token on the base's own samples

Directories come from `train_lm.py`. Gains are of the held-out judge, paired over prompts, with
95 % intervals.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of `harness` and `tasks`

import numpy as np
import torch

from harness.report import as_table, describe_machine
from tasks.figures import bootstrap, mean_difference
from tasks.outcomes import Outcomes
from tasks.plan import TASKS, plan_for
from tasks.students import student, untrained
from tasks.systems import World, build_world
from trimtab_training.config import SamplingConfig
from trimtab_training.distillation.fidelity import measure as measure_fidelity
from trimtab_training.distillation.student import Student
from trimtab_training.distillation.teachers import LocalTeacher
from trimtab_training.models import load_causal_lm
from trimtab_training.prompts import Prompt

PARTS: Final = ("objectives", "sizes", "approximate")
_OBJECTIVES: Final[dict[str, dict[str, Any]]] = {
    "quark": {"kind": "quark"},
    "quark-plain": {"kind": "quark", "entropy_coef": 0.0},
    "ppo": {"kind": "ppo", "epochs": 1},
    "nlpo": {"kind": "nlpo", "epochs": 1},
    "rloo": {"kind": "rloo"},
}
_NUM_TIMED: Final = 30


def gain_row(found: Outcomes, base: Outcomes, *, seed: int) -> dict[str, Any]:
    """Judge and reward less the base's, and the KL."""
    row: dict[str, Any] = {}
    for score in ("judge", "reward"):
        own, other = (outcomes.scores[score].mean(axis=1) for outcomes in (found, base))
        row[f"{score}_gain"] = bootstrap(mean_difference, own, other, seed=seed).as_list()
    row["kl"] = None if found.kl is None else float(found.kl.mean())
    row["tokens"] = float(found.num_tokens.mean())
    return row


def trained_row(world: World, base: Outcomes, seed: int) -> dict[str, Any]:
    """An adapter trained by the world's plan, against the world's own base or what stands in for it."""
    began = time.perf_counter()
    policy, prefix, costs = world.trained_policy("ipa", seed)
    row = gain_row(world.measured(policy, prefix, seed), base, seed=seed)
    return row | {"costs": costs, "seconds": time.perf_counter() - began}


def objectives(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every objective on every task."""
    rows = []
    for task in options.tasks:
        world = _world(options, task, options.bases[0], options.starts[0])
        base = world.base_outcomes(options.seed + 1)
        for kind in options.kinds:
            chosen = _OBJECTIVES[kind]
            if kind in ("rloo", "ppo", "nlpo"):
                chosen = {**chosen, "kl_coef": world.plan.objective.get("kl_coef", 0.02)}
            plan = replace(world.plan, objective=chosen)
            row = {"task": task, "objective": kind, **trained_row(replace(world, plan=plan), base, options.seed)}
            rows.append(_told(row))
    return rows


def sizes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every adapter LM on every base."""
    rows = []
    for base_dir in options.bases:
        world = _world(options, options.tasks[0], base_dir, options.starts[0])
        base = world.base_outcomes(options.seed + 1)
        for start in options.starts:
            own = replace(world, models=replace(world.models, start=start))
            small = load_causal_lm(start, dtype=torch.float32, device="cpu")
            row = {
                "base": base_dir.name,
                "base_parameters": _parameters(world.base),
                "adapter": start.name,
                "adapter_parameters": _parameters(small),
                "step_cost": step_seconds(small) / step_seconds(world.base),
            }
            rows.append(_told(row | trained_row(own, base, options.seed)))
    return rows


def approximate(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Adapters trained against stand-ins, measured with the base itself."""
    world = _world(options, options.tasks[0], options.bases[0], options.starts[0])
    base = world.base_outcomes(options.seed + 1)
    vocabulary = world.models.vocabulary
    teacher = LocalTeacher(
        world.base, sampling=SamplingConfig(max_tokens=world.task.max_tokens), top_logprobs=0, vocabulary=vocabulary
    )
    samples = teacher.draw([Prompt(text) for text in world.prompts], num_per_prompt=2, seed=options.seed)
    rows = []
    for name, stand_in in _stand_ins(world, options):
        model = load_causal_lm(stand_in, dtype=torch.float32, device="cpu")
        fidelity = measure_fidelity(Student(model, num_known=vocabulary.num_tokens), samples, seed=options.seed)
        own = replace(world, models=replace(world.models, base=stand_in))
        row = {"trained_against": name, "log_ratio": fidelity.log_ratio, "interval": list(fidelity.interval)}
        rows.append(_told(row | trained_row(own, base, options.seed)))
    return rows


def _stand_ins(world: World, options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """By name, made only when their turn comes."""
    small = world.models.start
    yield "the base", world.models.base
    yield "smaller", small
    yield "smaller, distilled", student(world, small)
    yield "random weights, distilled", student(world, untrained(small))
    yield from ((str(path), path) for path in options.approximate)


def step_seconds(model: Any, *, batch: int = 16, context: int = 64) -> float:
    """Median seconds of one decoding step in this process."""
    ids = torch.randint(1, model.config.vocab_size, (batch, context))
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        times = []
        for _ in range(_NUM_TIMED):
            began = time.perf_counter()
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _world(options: argparse.Namespace, task: str, base: Path, start: Path) -> World:
    plan = plan_for(task, quick=True, overrides=dict(options.set))
    return build_world(task, plan, data=options.data, base=base, start=start, num_threads=options.threads)


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _told(row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return (
            f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]" if len(value) == 3 else str(np.round(value, 3).tolist())
        )
    if isinstance(value, float):
        return f"{value:.3f}"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def main(argv: list[str]) -> int:
    options = _parse(argv)
    result: dict[str, Any] = {"part": options.part, "machine": describe_machine(), "seed": options.seed}
    parts = {"objectives": objectives, "sizes": sizes, "approximate": approximate}
    rows = result["rows"] = parts[options.part](options)
    print(as_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--tasks", type=_names, default=["toxicity"], help=f"of {', '.join(TASKS)}; first for sizes")
    parser.add_argument("--kinds", type=_names, default=["quark", "ppo", "nlpo", "rloo"])
    parser.add_argument("--bases", type=_paths, default=[Path("../shared/models/base7m")])
    parser.add_argument("--starts", type=_paths, default=[Path("../shared/models/small2m")])
    parser.add_argument("--approximate", type=_paths, default=[], help="further directories")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", type=_setting, action="append", default=[], help="a setting of the plan, name=JSON")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _paths(text: str) -> Sequence[Path]:
    return [Path(part) for part in _names(text)]


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
