"""Replies that keep to a given text: BEGIN on Wizard of Wikipedia, labelled for attribution.

Topical-Chat is not used: its rows come without the texts that the speakers had read, so nothing says what a reply to
them would have to rest on.
"""

from collections.abc import Sequence

from tasks.classifiers import Labelled, TreeModel, View, WordModel, mean_target, output_of, quality, rows_of
from tasks.rows import Part, part_of, read_rows
from tasks.sources import Sources, distinct
from tasks.task import LONG_ENOUGH, Length, LongEnough, Task
from tasks.text_numbers import output_support, share_of_runs, words
from trimtab_adapters.contract.rewards import RewardInput

_MIN_WORDS = 5
_MAX_TOKENS = 28
_LONGEST_PROMPT = 600
"""Characters."""


class CopiedPairs:
    """Share of an output's pairs of words that the prompt has: how much of it is copied."""

    version = "1"

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """See `Scores`."""
        return [share_of_runs(words(item.prompt), words(item.output), 2) for item in inputs]


def grounded(sources: Sources) -> Task:
    """Reward and judge: the probability that a reply is fully attributable to the knowledge before it."""
    parts: dict[Part, list[Labelled]] = {"training": [], "judge": [], "held_out": []}
    for row in read_rows(sources.data, "begin_wow/responses"):
        prompt = f"{row['knowledge']}\nA: {row['message']}\nB:"
        if len(prompt) <= _LONGEST_PROMPT:
            item = RewardInput(prompt, f" {row['response']}")
            parts[part_of(row["knowledge"])].append(Labelled(item, float(row["label"] == "fully_attributable")))
    reward = WordModel(parts["training"], View((output_of,), output_support), strength=0.5)
    judge = TreeModel(parts["judge"], View((output_of,), output_support), num_features=100)
    held_out = parts["held_out"]
    return Task(
        name="grounded",
        reward=LongEnough(reward, _MIN_WORDS, mean_target(parts["training"])),
        judge=LongEnough(judge, _MIN_WORDS, mean_target(parts["judge"])),
        train_prompts=distinct([row.item.prompt for row in parts["training"]]),
        held_out_prompts=distinct([row.item.prompt for row in held_out]),
        good=[row.item for row in parts["training"] if row.target > 0.5],
        bad=[row.item for row in parts["training"] if row.target < 0.5],
        max_tokens=_MAX_TOKENS,
        stops_at_newline=True,
        measures={LONG_ENOUGH: Length(_MIN_WORDS), "copied pairs": CopiedPairs()},
        notes={
            "reward": quality(reward.score(rows_of(held_out)), held_out),
            "judge": quality(judge.score(rows_of(held_out)), held_out),
        },
    )
