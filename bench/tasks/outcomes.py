"""What a policy's outputs on the held-out prompts are worth: drawn, scored, judged and read by the base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tasks.task import Task
from trimtab_training.policy import TailoredPolicy, evaluating
from trimtab_training.prompts import Prompt
from trimtab_training.rollouts import RolloutSource, Sample

Floats = NDArray[np.float64]

_ROWS_PER_FORWARD = 32


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Figures of outputs, `[prompts, outputs]` each.

    Attributes:
        scores: `reward`, `judge` and the task's own measures.
        nll: Negative log-probability under the base.
        kl: Sum over its tokens of KL(policy || base), in nats; None for a choice among outputs, which moves further
            from the base than the policy that drew them.
        num_tokens: Its length.
        token_ids: Its tokens.
    """

    scores: Mapping[str, Floats]
    nll: Floats
    kl: Floats | None
    num_tokens: Floats
    token_ids: Sequence[Sequence[tuple[int, ...]]]

    def chosen(self, picks: NDArray[np.int64]) -> Self:
        """Some outputs of each prompt; `picks` `[prompts, chosen]` are their places."""

        def take(values: Floats) -> Floats:
            return np.take_along_axis(values, picks, axis=1)

        return type(self)(
            {name: take(values) for name, values in self.scores.items()},
            take(self.nll),
            None,
            take(self.num_tokens),
            [[row[i] for i in chosen] for row, chosen in zip(self.token_ids, picks.tolist(), strict=True)],
        )

    @classmethod
    def joined(cls, parts: "Sequence[Outcomes]") -> "Outcomes":
        """Outputs of several seeds side by side."""
        return Outcomes(
            {name: np.hstack([part.scores[name] for part in parts]) for name in parts[0].scores},
            np.hstack([part.nll for part in parts]),
            None if parts[0].kl is None else np.hstack([part.kl for part in parts if part.kl is not None]),
            np.hstack([part.num_tokens for part in parts]),
            [[ids for row in rows for ids in row] for rows in zip(*(part.token_ids for part in parts), strict=True)],
        )


def measure(
    task: Task,
    policy: TailoredPolicy,
    source: RolloutSource,
    prompts: Sequence[str],
    *,
    prefix: Sequence[int],
    num_samples: int,
    seed: int,
    steered: bool,
) -> Outcomes:
    """Draw from a policy and measure what comes.

    Args:
        task: Its reward, judge and measures.
        policy: Reads the outputs; its base says how likely they are.
        source: Draws them, in this process or through an engine.
        prompts: What to answer.
        prefix: What the adapter sees first.
        num_samples: Outputs per prompt.
        seed: Of the drawing.
        steered: Whether the policy draws, or its base alone.
    """
    drawn = source.draw([Prompt(p) for p in prompts], num_per_prompt=num_samples, seed=seed, steered=steered)
    samples = [sample for group in drawn for sample in group]
    shape = (len(prompts), num_samples)
    inputs = [sample.reward_input for sample in samples]
    judges = {"reward": task.reward, "judge": task.judge, **task.measures}
    scores = {name: np.array(judge.score(inputs)).reshape(shape) for name, judge in judges.items()}
    nll, kl = _read(policy, samples, prefix)
    return Outcomes(
        scores,
        nll.reshape(shape),
        (kl if steered else np.zeros_like(kl)).reshape(shape),
        np.array([float(len(sample.output_token_ids)) for sample in samples]).reshape(shape),
        [[sample.output_token_ids for sample in group] for group in drawn],
    )


def _read(policy: TailoredPolicy, samples: Sequence[Sample], prefix: Sequence[int]) -> tuple[Floats, Floats]:
    """Negative log-probability under the base and KL of each output."""
    nll, kl = np.zeros(len(samples)), np.zeros(len(samples))
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt_token_ids))
    with evaluating(policy.adapter):
        for start in range(0, len(order), _ROWS_PER_FORWARD):
            places = order[start : start + _ROWS_PER_FORWARD]
            rows = [samples[i] for i in places]
            output = policy.forward(
                [row.prompt_token_ids for row in rows],
                [row.output_token_ids for row in rows],
                [tuple(prefix)] * len(rows),
            )
            nll[places] = -output.token_logprobs()[1].double().sum(dim=-1).numpy()
            kl[places] = output.kl().double().sum(dim=-1).numpy()
    return nll, kl
