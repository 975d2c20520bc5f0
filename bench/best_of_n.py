"""Best-of-N on a real model with a real reward: what theory says of it, what it costs, and what two strategies save.

    python bench/best_of_n.py --json best_of_n.json

    theory        win rate and KL of best-of-n, n = 1..32, against their closed forms
    wall          best-of-8 with the reward through the gateway against n=8 straight from the engine
    adaptive      tokens of sampling that stops early, at the calibrated reward of best-of-8
    early_reject  tokens and reward of best-of-8 that drops candidates on the way

The reward is a classifier of sentiment (bench/train_classifier.py); the prompts are openings of stories. Calibrated
rewards are taken among samples that were drawn apart, not among those that a request itself was calibrated with.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import sample_pool, services
from harness.best_of_n_world import REWARD, World
from harness.classifier import classifier
from harness.completions import Completions
from harness.report import describe_machine
from harness.story_prompts import openings
from harness.strategy_parts import AdaptivePlan, RejectPlan, measure_adaptive, measure_early_reject
from harness.theory_check import check_theory, theory_table
from harness.wall_clock import measure_wall, wall_table
from trimtab_adapters.contract.rewards import RewardSpec
from trimtab_server.rewards.classifier import ClassifierReward

PARTS = ("theory", "wall", "adaptive", "early_reject")


def main(argv: list[str]) -> int:
    options = _parse(argv)
    services.stop_on_sigterm()
    result: dict[str, Any] = {"machine": describe_machine(), "options": {k: str(v) for k, v in vars(options).items()}}
    with _world(options) as world:
        result["ties"] = world.pool.tie_share
        print(f"{len(world.prompts)} prompts, {world.pool.rewards.shape[1]} samples each, ", end="")
        print(f"{world.pool.lengths.mean():.1f} tokens on average; pairs with equal rewards: {result['ties']:.1e}\n")
        for part in options.parts:
            print(f"## {part}\n", flush=True)
            result |= _RUN[part](world, options)
            print(flush=True)
            if options.json:  # after each part: a later one may take long
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_parts, default=list(PARTS))
    parser.add_argument("--base", type=Path, default=Path("../shared/models/base7m"))
    parser.add_argument("--classifier", type=Path, help="of a reward that is there already")
    parser.add_argument("--start", type=Path, default=Path("../shared/models/small2m"), help="of the classifier")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--dtype", default="float32", help="of the base in the engine")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--pool", type=int, default=319, help="samples per prompt; plus one a multiple of --bins")
    parser.add_argument("--bins", type=int, default=10, help="of the ranks, for the KL")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="per prompt, n and setting")
    parser.add_argument("--rounds", type=int, default=3, help="of the part `wall`")
    parser.add_argument("--sizes", type=_numbers, default=[1, 2, 4, 8, 16, 32], help="n of the part `theory`")
    parser.add_argument(
        "--adaptive", type=json.loads, default={"strategy": "adaptive", "wave": 1}, help="`selection`, as JSON"
    )
    parser.add_argument("--cap", type=int, default=20, help="candidates of `adaptive` at most")
    parser.add_argument("--thresholds", type=_fractions, default=[0.7, 0.75, 0.8, 0.85, 0.9])
    parser.add_argument("--waves", type=_numbers, default=[1] * 20, help="of the simulation of `adaptive`")
    parser.add_argument("--calibration", type=int, default=128, help="reference rollouts of `adaptive`")
    parser.add_argument(
        "--early-reject",
        type=json.loads,
        action="append",
        help="`selection` and `best_of`, as JSON; may be repeated, the first gives the key figures",
    )
    parser.add_argument("--quick", action="store_true", help="few prompts and requests, to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.quick:
        options.prompts, options.pool, options.requests, options.rounds = 6, 79, 2, 1
    options.early_reject = options.early_reject or _default_rejects(options.max_tokens)
    return options


def _default_rejects(max_tokens: int) -> list[dict[str, Any]]:
    """The gateway's own default, then one start with more candidates, then two checkpoints."""
    sixteenth = max(1, max_tokens // 16)
    settings = ((8, 0.5, [3]), (10, 0.4, [2]), (8, 0.75, [4, 8, 12]), (8, 0.5, [4, 8]))
    return [
        {
            "strategy": "early_reject",
            "best_of": num,
            "keep": keep,
            "checkpoints": [sixteenth * at for at in checkpoints],
        }
        for num, keep, checkpoints in settings
    ]


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if not set(parts) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"parts are {', '.join(PARTS)}")
    return parts


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _fractions(text: str) -> list[float]:
    return sorted(float(part) for part in text.split(","))


@contextmanager
def _world(options: argparse.Namespace) -> Iterator[World]:
    """Engine and gateway with the reward registered, and the pool of samples, which the gateway knows nothing of."""
    from transformers import AutoTokenizer

    directory = options.classifier or classifier(options.data, options.start)
    spec = RewardSpec(name=REWARD, kind="hf_classifier", target=str(directory), options={"batch_size": 64})
    reward = ClassifierReward.load(spec)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    prompts = openings(options.data, options.prompts)
    sampling = {"max_tokens": options.max_tokens, "temperature": 1.0}
    rejects = options.early_reject if "early_reject" in options.parts else []
    checkpoints = {number for one in rejects for number in one["checkpoints"]}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "engine.log"
        with (
            services.engine(options.base, log, dtype=options.dtype, nice=10) as engine_url,
            services.gateway(engine_url, Path(folder) / "gateway") as gateway_url,
            Completions(engine_url) as engine,
            Completions(gateway_url) as gateway,
        ):
            gateway.post("/admin/rewards", spec.model_dump())
            samples = sample_pool.draw(engine, services.MODEL, options.base, prompts, options.pool, sampling)
            pool = sample_pool.score(samples, reward, tokenizer, sorted(checkpoints))
            yield World(engine, gateway, reward, pool, sampling)


def _theory(world: World, options: argparse.Namespace) -> dict[str, Any]:
    rows = check_theory(world, options.sizes, options.requests, options.bins)
    print(theory_table(rows))
    return {"theory": rows}


def _wall(world: World, options: argparse.Namespace) -> dict[str, Any]:
    ways = measure_wall(world, 8, options.rounds)
    print(wall_table(ways))
    return {"wall": ways, "best_of_8_wall_ratio": ways["gateway, best_of"]["ratio"]}


def _adaptive(world: World, options: argparse.Namespace) -> dict[str, Any]:
    plan = AdaptivePlan(
        selection=options.adaptive,
        thresholds=options.thresholds,
        cap=options.cap,
        waves=options.waves,
        calibration=options.calibration,
        num_requests=options.requests,
    )
    return measure_adaptive(world, plan)


def _early_reject(world: World, options: argparse.Namespace) -> dict[str, Any]:
    return measure_early_reject(world, RejectPlan(options.early_reject, options.requests))


_RUN = {"theory": _theory, "wall": _wall, "adaptive": _adaptive, "early_reject": _early_reject}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
