"""Pools of outputs per prompt that are larger than one request may ask for."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from trimtab_training.prompts import Prompt
from trimtab_training.rollouts import RolloutSource, Sample

MOST_PER_DRAW = 16
"""Outputs per prompt and draw; the gateway allows 20 choices of a request."""


def draw_in_parts(
    source: RolloutSource,
    prompts: Sequence[Prompt],
    *,
    size: int,
    seed: np.random.SeedSequence,
    steered: bool,
    on_done: Callable[[], None] | None = None,
) -> Iterator[list[list[Sample]]]:
    """Draw `size` outputs for each prompt, in parts of `MOST_PER_DRAW` at most, each with a seed of its own.

    The arguments are those of `RolloutSource.draw` but for the seed, and so is each part: for every prompt its outputs.
    """
    starts = range(0, size, MOST_PER_DRAW)
    seeds = seed.generate_state(len(starts)) >> 1
    for start, part_seed in zip(starts, seeds.tolist(), strict=True):
        num = min(MOST_PER_DRAW, size - start)
        yield source.draw(prompts, num_per_prompt=num, seed=part_seed, steered=steered, on_done=on_done)
