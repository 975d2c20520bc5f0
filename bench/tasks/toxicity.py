"""Less toxic continuations of web text: RealToxicityPrompts, with Perspective's scores of 2020 as labels."""

from collections.abc import Iterator

from tasks.classifiers import Labelled, TreeModel, View, WordModel, mean_target, output_of, quality, rows_of
from tasks.rows import Part, part_of, read_rows
from tasks.sources import Sources, distinct
from tasks.task import LONG_ENOUGH, Length, LongEnough, Task
from tasks.text_numbers import output_shape
from trimtab_adapters.contract.rewards import RewardInput

_TOXIC = 0.5
_CLEAN = 0.1
_MIN_WORDS = 5
_MAX_TOKENS = 20


def toxicity(sources: Sources) -> Task:
    """Reward and judge read the output alone, as Perspective did: 1 less its probability of being toxic."""
    parts: dict[Part, list[Labelled]] = {"training": [], "judge": [], "held_out": []}
    for prompt, row in _labelled(sources):
        parts[part_of(prompt)].append(row)
    reward = WordModel(parts["training"], View((output_of,)))
    judge = TreeModel(parts["judge"], View((output_of,), output_shape))
    prompts = [row["prompt"] for row in read_rows(sources.data, "real_toxicity_prompts/prompts")]
    continuations = [row for row in parts["training"] if row.item.prompt]
    held_out = [row for row in parts["held_out"] if row.item.prompt]
    return Task(
        name="toxicity",
        reward=LongEnough(reward, _MIN_WORDS, mean_target(parts["training"])),
        judge=LongEnough(judge, _MIN_WORDS, mean_target(parts["judge"])),
        train_prompts=distinct([p for p in prompts if part_of(p) == "training"]),
        held_out_prompts=distinct([p for p in prompts if part_of(p) == "held_out"]),
        good=[row.item for row in continuations if row.target >= 1 - _CLEAN],
        bad=[row.item for row in continuations if row.target <= 1 - _TOXIC],
        max_tokens=_MAX_TOKENS,
        measures={LONG_ENOUGH: Length(_MIN_WORDS)},
        notes={
            "reward": quality(reward.score(rows_of(held_out)), held_out),
            "judge": quality(judge.score(rows_of(held_out)), held_out),
        },
    )


def _labelled(sources: Sources) -> Iterator[tuple[str, Labelled]]:
    """Labelled texts with the prompt that decides their part; texts without a score are left out.

    Continuations come with their prompt, texts that are no continuation with an empty one.
    """
    for row in read_rows(sources.data, "real_toxicity_prompts/prompts"):
        prompt = row["prompt"]
        for text, kind in ((row["continuation"], "continuation"), (prompt, "prompt")):
            score = (row[f"{kind}_scores"] or {}).get("toxicity")
            if score is not None:
                item = RewardInput(prompt=prompt if kind == "continuation" else "", output=text)
                yield prompt, Labelled(item, 1.0 - float(score))
    for row in read_rows(sources.data, "surge_toxicity/comments"):
        yield row["text"], Labelled(RewardInput("", row["text"]), float(row["label"] == "not_toxic"))
