"""Wall-clock of best-of-8 with a reward through the gateway against eight choices straight from the engine."""

import random
import statistics
from collections.abc import Mapping
from typing import Any

from harness.best_of_n_world import World
from harness.completions import Completion, Completions
from harness.report import as_table
from harness.services import MODEL

WARM_SIZE = 16
"""Reference rollouts of the calibrator that is there already."""


def measure_wall(world: World, num: int, rounds: int) -> dict[str, Any]:
    """All ways answer the same prompts with the same seeds and numbers of tokens, in turns within each round.

    Args:
        world: Where to ask.
        num: Candidates.
        rounds: How often each prompt is asked; one more comes first and is not counted.

    Returns:
        By way: its median in seconds, and the median of its ratio to the engine, with the quartiles, formed within
        a prompt and round.
    """
    fixed = {**world.sampling, "ignore_eos": True}
    walls: dict[str, list[float]] = {way: [] for way in _ways(world, "", 0, num)}
    generator = random.Random(0)
    for number in range(rounds + 1):
        for i, prompt in enumerate(world.prompts):
            ways = _ways(world, prompt, 1 + i * 128, num)
            names = list(ways)
            generator.shuffle(names)
            for way in names:
                server, body = ways[way]
                answer = server.one({**body, **fixed})
                _check_tokens(answer, num * int(fixed["max_tokens"]), way)
                if number:
                    walls[way].append(answer.wall_s)
    direct = walls["engine, n"]
    return {way: _figures(wall_s, direct) for way, wall_s in walls.items()}


def wall_table(result: Mapping[str, Mapping[str, Any]]) -> str:
    """The ways as a table."""
    body = [
        [
            *(way, f"{figures['median_s'] * 1e3:.0f}", f"{figures['ratio']:.2f}"),
            f"{figures['ratio_quartiles'][0]:.2f} to {figures['ratio_quartiles'][1]:.2f}",
        ]
        for way, figures in result.items()
    ]
    return as_table(["way", "ms, median", "to the engine", "quartiles"], body)


def _ways(world: World, prompt: str, seed: int, num: int) -> dict[str, tuple[Completions, dict[str, Any]]]:
    plain = {"model": MODEL, "prompt": prompt, "seed": seed, "n": num}
    return {
        "engine, n": (world.engine, plain),
        "gateway, n": (world.gateway, plain),
        "gateway, best_of": (world.gateway, world.ranked(prompt, seed, num, calibration=0)),
        "gateway, best_of, calibrated": (world.gateway, world.ranked(prompt, seed, num, calibration=WARM_SIZE)),
    }


def _check_tokens(answer: Completion, expected: int, way: str) -> None:
    if answer.num_tokens != expected:
        raise RuntimeError(f"{way} generated {answer.num_tokens} tokens, not {expected}; nothing can be compared")


def _figures(wall_s: list[float], direct_s: list[float]) -> dict[str, Any]:
    ratios = [mine / its for mine, its in zip(wall_s, direct_s, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median_s": statistics.median(wall_s), "ratio": middle, "ratio_quartiles": [low, high]}
