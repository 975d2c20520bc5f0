"""Replies that keep to a given text: BEGIN on Wizard of Wikipedia, labelled for attribution.

Topical-Chat is not used: its rows come without the texts that the speakers had read, so nothing says what a reply to
them would have to rest on.
"""

import statistics
from collections.abc import Sequence

from tasks.classifiers import Labelled, LogOdds, TreeModel, View, WordModel, output_of, quality, rows_of
from tasks.rows import Part, part_of, read_rows
from tasks.sources import Sources, distinct
from tasks.task import LONG_ENOUGH, Length, LongEnough, Scores, Task
from tasks.text_numbers import output_support, share_of_runs, words
from trimtab_adapters.contract.rewards import RewardInput

_MIN_WORDS = 5
_MAX_TOKENS = 28
_LONGEST_PROMPT = 600
"""Characters."""
_NUM_USUAL = 300
"""Prompts of which the base's outputs say what an answer is usually worth."""


class CopiedPairs:
    """Share of an output's pairs of words that the prompt has: how much of it is copied."""

    version = "1"

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """See `Scores`."""
        return [share_of_runs(words(item.prompt), words(item.output), 2) for item in inputs]


def grounded(sources: Sources) -> Task:
    """Reward and judge: log-odds that a reply is fully attributable to the knowledge before it.

    Their probabilities would not do: those of a small base's replies are all near 0, and alike.
    """
    parts: dict[Part, list[Labelled]] = {"training": [], "judge": [], "held_out": []}
    for row in read_rows(sources.data, "begin_wow/responses"):
        prompt = f"{row['knowledge']}\nA: {row['message']}\nB:"
        if len(prompt) <= _LONGEST_PROMPT:
            item = RewardInput(prompt, f" {row['response']}")
            parts[part_of(row["knowledge"])].append(Labelled(item, float(row["label"] == "fully_attributable")))
    view = View((output_of,), output_support)
    reward = LogOdds(WordModel(parts["training"], view, strength=0.5))
    judge = LogOdds(TreeModel(parts["judge"], view, num_features=100))
    held_out = parts["held_out"]
    train_prompts = distinct([row.item.prompt for row in parts["training"]])
    usual = long_enough(train_prompts[:_NUM_USUAL], sources)
    return Task(
        name="grounded",
        reward=LongEnough(reward, _MIN_WORDS, mean_score(reward, usual)),
        judge=LongEnough(judge, _MIN_WORDS, mean_score(judge, usual)),
        train_prompts=train_prompts,
        held_out_prompts=distinct([row.item.prompt for row in held_out]),
        good=[row.item for row in parts["training"] if row.target > 0.5],
        bad=[row.item for row in parts["training"] if row.target < 0.5],
        max_tokens=_MAX_TOKENS,
        stops_at_newline=True,
        measures={LONG_ENOUGH: Length(_MIN_WORDS), "copied pairs": CopiedPairs()},
        notes={
            "reward": quality(reward.score(rows_of(held_out)), held_out, threshold=0.0),
            "judge": quality(judge.score(rows_of(held_out)), held_out, threshold=0.0),
        },
    )


def long_enough(prompts: Sequence[str], sources: Sources) -> list[RewardInput]:
    """The base's outputs, one line for each prompt, without those that are too short."""
    lines = [text.split("\n")[0] for text in sources.draw(prompts, _MAX_TOKENS)]
    items = [RewardInput(prompt, line) for prompt, line in zip(prompts, lines, strict=True)]
    return [item for item, length in zip(items, Length(_MIN_WORDS).score(items), strict=True) if length]


def mean_score(scores: Scores, items: Sequence[RewardInput]) -> float:
    """What an output of the base is usually worth."""
    return statistics.fmean(scores.score(items))
