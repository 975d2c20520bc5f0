"""What a task is: prompts, a reward to train on, a judge that nothing is trained on, and examples of good and bad."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from trimtab_adapters.contract.rewards import RewardInput


class Scores(Protocol):
    """Judges outputs in this process; larger is better."""

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        ...

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One number per input, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """One task, ready to be run.

    Attributes:
        name: As on the command line.
        reward: What is trained on and what best-of-N ranks by.
        judge: Of another family, made from other prompts; it decides.
        train_prompts: Distinct, without those of the judge's making.
        held_out_prompts: Distinct, of the held-out part.
        good: Prompt and output as they should be; of the training part, for the expert.
        bad: Likewise as they should not be, for the anti-expert.
        max_tokens: Longest output.
        stops_at_newline: Whether an output is one line.
        measures: Further figures by name.
        notes: What a reader must know of reward and judge: accuracies, numbers of rows.
    """

    name: str
    reward: Scores
    judge: Scores
    train_prompts: Sequence[str]
    held_out_prompts: Sequence[str]
    good: Sequence[RewardInput]
    bad: Sequence[RewardInput]
    max_tokens: int
    stops_at_newline: bool = False
    measures: Mapping[str, Scores] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


LONG_ENOUGH: Final = "long enough"
"""Name of the measure that says which outputs `LongEnough` lets count."""


@dataclass(frozen=True, slots=True)
class Length:
    """1 for an output of `min_words` words or more, else 0."""

    min_words: int

    @property
    def version(self) -> str:
        """See `Scores`."""
        return f"at least {self.min_words} words"

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """See `Scores`."""
        return [float(len(item.output.split()) >= self.min_words) for item in inputs]


@dataclass(frozen=True, slots=True)
class LongEnough:
    """Scores under which too short an answer, of less than `min_words` words, is worth `when_short`.

    Without it, saying nothing is the surest way to say nothing wrong, and any policy learns that. A value far from what
    answers usually get is no better: then most of what a policy learns is how long to talk. So it is the mean
    of the labels, or of the base's scores if those are far from it, and 0 where a short answer fails the task.
    """

    scores: Scores
    min_words: int
    when_short: float = 0.0

    @property
    def version(self) -> str:
        """See `Scores`."""
        return f"{self.scores.version}, at least {self.min_words} words or {self.when_short}"

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """See `Scores`."""
        lengths = Length(self.min_words).score(inputs)
        return [
            score if length else self.when_short
            for score, length in zip(self.scores.score(inputs), lengths, strict=True)
        ]
