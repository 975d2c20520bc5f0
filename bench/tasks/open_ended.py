"""Coherent stories: TinyStories, where what is wanted is the continuation that cannot be told from the real one."""

from collections.abc import Sequence

from tasks.classifiers import Labelled, TreeModel, View, WordModel, output_of, quality, rows_of
from tasks.rows import Part, part_of, read_rows
from tasks.sources import Sources, distinct
from tasks.task import LONG_ENOUGH, Length, LongEnough, Task
from tasks.text_numbers import Familiarity, output_support
from trimtab_adapters.contract.rewards import RewardInput

_MIN_WORDS = 10
_MAX_TOKENS = 48
_PROMPT_WORDS = 30
_MOST_STORIES = 500
"""Of a part; each costs a sample of the base."""


def open_ended(sources: Sources) -> Task:
    """Reward and judge: the probability that a continuation is the real one and not the base's."""
    real: dict[Part, list[RewardInput]] = {"training": [], "judge": [], "held_out": []}
    for row in read_rows(sources.data, "tinystories/stories"):
        found = row["text"].split(" ")
        if row["boundaries"] == "exact" and len(found) > _PROMPT_WORDS + _MAX_TOKENS:
            prompt = opening(row["text"])
            part = real[part_of(prompt)]
            if len(part) < _MOST_STORIES:
                part.append(RewardInput(prompt, sources.cut(row["text"][len(prompt) :], _MAX_TOKENS)))
    parts = {part: _against_base(items, sources) for part, items in real.items()}
    reward = WordModel(parts["training"], View((output_of,), output_support))
    half = len(real["judge"]) // 2
    usual = Familiarity(item.output for item in real["judge"][:half])
    judged = [row for row in parts["judge"] if row.item.prompt in {item.prompt for item in real["judge"][half:]}]
    judge = TreeModel(judged, View((output_of,), lambda i: [*output_support(i), *usual.numbers(i.output)]))
    held_out = parts["held_out"]
    return Task(
        name="open-ended",
        reward=LongEnough(reward, _MIN_WORDS),
        judge=LongEnough(judge, _MIN_WORDS),
        train_prompts=distinct([item.prompt for item in real["training"]]),
        held_out_prompts=distinct([item.prompt for item in real["held_out"]]),
        good=[row.item for row in parts["training"] if row.target],
        bad=[row.item for row in parts["training"] if not row.target],
        max_tokens=_MAX_TOKENS,
        measures={LONG_ENOUGH: Length(_MIN_WORDS)},
        notes={
            "reward": quality(reward.score(rows_of(held_out)), held_out),
            "judge": quality(judge.score(rows_of(held_out)), held_out),
        },
    )


def opening(story: str) -> str:
    """The words of a story that are its prompt."""
    return " ".join(story.split(" ")[:_PROMPT_WORDS])


def _against_base(items: Sequence[RewardInput], sources: Sources) -> list[Labelled]:
    drawn = sources.draw([item.prompt for item in items], _MAX_TOKENS)
    return [
        *(Labelled(item, 1.0) for item in items),
        *(Labelled(RewardInput(item.prompt, text), 0.0) for item, text in zip(items, drawn, strict=True)),
    ]
