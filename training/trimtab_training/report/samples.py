"""A few held-out prompts with an output of each policy, side by side."""

from dataclasses import dataclass

import numpy as np

from trimtab_training.evaluation.held_out import Drawn

_MOST_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class SamplePair:
    """The first output that each policy gave to one prompt, with its rewards in the order of the rewards' names."""

    prompt: str
    base: str
    steered: str
    base_rewards: tuple[float, ...]
    steered_rewards: tuple[float, ...]


def choose_samples(base: Drawn, steered: Drawn, *, num: int, seed: int) -> list[SamplePair]:
    """Pairs for `num` prompts, or for all where there are fewer; the seed, nothing about the outputs, chooses them."""
    order = np.random.default_rng([seed, 4]).permutation(len(base.samples))[:num]
    return [_pair(base, steered, int(index)) for index in sorted(order.tolist())]


def _pair(base: Drawn, steered: Drawn, index: int) -> SamplePair:
    return SamplePair(
        prompt=_cut(base.samples[index][0].prompt),
        base=_cut(base.samples[index][0].output),
        steered=_cut(steered.samples[index][0].output),
        base_rewards=_rewards(base, index),
        steered_rewards=_rewards(steered, index),
    )


def _rewards(drawn: Drawn, index: int) -> tuple[float, ...]:
    return tuple(float(rewards[index, 0]) for rewards in drawn.rewards.values())


def _cut(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate can be in a prompt, and in no file
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} […]"
