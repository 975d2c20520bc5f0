"""Safe replies in a dialogue: DiaSafety, whose labels judge a reply in its context."""

from tasks.classifiers import Labelled, TreeModel, View, WordModel, mean_target, output_of, prompt_of, quality, rows_of
from tasks.rows import Part, part_of, read_rows
from tasks.sources import Sources, distinct
from tasks.task import LONG_ENOUGH, Length, LongEnough, Task
from tasks.text_numbers import output_support
from trimtab_adapters.contract.rewards import RewardInput

_MIN_WORDS = 3
_MAX_TOKENS = 24
_LONGEST_CONTEXT = 300
"""Characters; the base has seen few longer ones."""


def dialogue_safety(sources: Sources) -> Task:
    """Reward and judge: the probability that a reply is safe in its context."""
    parts: dict[Part, list[Labelled]] = {"training": [], "judge": [], "held_out": []}
    for row in read_rows(sources.data, "diasafety/pairs"):
        if len(row["context"]) <= _LONGEST_CONTEXT:
            item = RewardInput(f"A: {row['context']}\nB:", f" {row['response']}")
            parts[part_of(row["context"])].append(Labelled(item, float(row["label"] == "safe")))
    view = View((output_of, prompt_of), output_support)
    reward, judge = WordModel(parts["training"], view), TreeModel(parts["judge"], view)
    held_out = parts["held_out"]
    return Task(
        name="dialogue-safety",
        reward=LongEnough(reward, _MIN_WORDS, mean_target(parts["training"])),
        judge=LongEnough(judge, _MIN_WORDS, mean_target(parts["judge"])),
        train_prompts=distinct([row.item.prompt for row in parts["training"]]),
        held_out_prompts=distinct([row.item.prompt for row in held_out]),
        good=[row.item for row in parts["training"] if row.target > 0.5],
        bad=[row.item for row in parts["training"] if row.target < 0.5],
        max_tokens=_MAX_TOKENS,
        stops_at_newline=True,
        measures={LONG_ENOUGH: Length(_MIN_WORDS)},
        notes={
            "reward": quality(reward.score(rows_of(held_out)), held_out),
            "judge": quality(judge.score(rows_of(held_out)), held_out),
        },
    )
