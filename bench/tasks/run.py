"""One task of IPA on real data, from data to table.

    python bench/tasks/run.py --task toxicity --quick --json toxicity.json

Systems: the base; the base steered by an adapter LM (IPA); the base itself fine-tuned with the same objective,
rollouts and steps; a pair of experts (DExperts); best-of-8 of the base by the reward; IPA with best-of-8. All draw at
temperature 1 in this process. The judge is of another family than the reward and comes from other prompts; all is
measured on prompts that neither it, nor the reward, nor any policy was trained on. No text is printed or written.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of `harness` and `tasks`

from harness.report import describe_machine
from tasks.comparison import as_rows, compare, table
from tasks.plan import TASKS, plan_for
from tasks.systems import World, build_world


def main(argv: list[str]) -> int:
    options = _parse(argv)
    began = time.perf_counter()
    plan = plan_for(options.task, quick=options.quick, overrides=dict(options.set))
    world = build_world(
        options.task, plan, data=options.data, base=options.base, start=options.start, num_threads=options.threads
    )
    _say(f"{options.task}: {json.dumps(world.task.notes)}")
    result: dict[str, Any] = {
        "task": options.task,
        "machine": describe_machine(),
        "plan": plan.described(),
        "notes": dict(world.task.notes),
        "num_held_out_prompts": len(world.prompts),
        "seeds": [],
    }
    parts = []
    for seed in options.seeds:
        outcomes, costs = world.run_seed(seed, options.systems)
        parts.append(outcomes)
        rows = compare(outcomes, seed=seed)
        result["seeds"].append({"seed": seed, "costs": costs, "rows": as_rows(rows)})
        _say(f"seed {seed} after {time.perf_counter() - began:.0f} s: {json.dumps(costs)}")
    pooled = compare(World.pooled(parts), seed=0)
    result["rows"] = as_rows(pooled)
    result["wall_s"] = time.perf_counter() - began
    print(f"{len(world.prompts)} held-out prompts, {plan.num_samples} outputs each, seeds {options.seeds}; ", end="")
    print("value [95 % interval over prompts]\n")
    print(table(pooled))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--quick", action="store_true", help="fewer prompts and steps")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--base", type=Path, default=Path("../shared/models/base7m"))
    parser.add_argument("--start", type=Path, default=Path("../shared/models/small2m"), help="of adapter and experts")
    parser.add_argument("--seeds", type=_numbers, default=[0], help="comma-separated; each trains and draws anew")
    parser.add_argument("--systems", type=_names, default=["ipa", "fine_tuning", "experts"], help="besides the base")
    parser.add_argument("--set", type=_setting, action="append", default=[], help="a setting of the plan, name=JSON")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
