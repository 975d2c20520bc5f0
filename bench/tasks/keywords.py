"""A sentence with given keywords in a given order: CommonGen, after IPA's constrained generation.

The reward is IPA's: ordered coverage times the probability that the sentence is acceptable. Acceptability is learned
from people's sentences against the same ones broken up.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.classifiers import Labelled, TreeModel, View, WordModel, output_of, quality, rows_of
from tasks.rows import Part, in_order, part_of, read_rows
from tasks.sources import Sources, distinct
from tasks.task import LONG_ENOUGH, Length, LongEnough, Scores, Task
from tasks.text_numbers import Familiarity, content_words, output_shape, shape
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_server.rewards.keywords import KeywordOptions, KeywordReward

_PATTERN = r"Keywords: (.*)\nSentence:"
_MIN_WORDS = 4
_MAX_TOKENS = 28
_MOST_SETS = 6000
"""Sets of keywords that are used; finding lemmas takes its time."""


@dataclass(frozen=True, slots=True)
class Product:
    """The product of several scores."""

    factors: tuple[Scores | KeywordReward, ...]

    @property
    def version(self) -> str:
        """See `Scores`."""
        return " x ".join(factor.version for factor in self.factors)

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """See `Scores`."""
        products = [1.0] * len(inputs)
        for factor in self.factors:
            products = [a * b for a, b in zip(products, factor.score(inputs), strict=True)]
        return products


def keywords(sources: Sources) -> Task:
    """Prompts name the keywords in the order in which a person used them."""
    ordered = KeywordReward("ordered", KeywordOptions(prompt_pattern=_PATTERN, measure="ordered"))
    coverage = KeywordReward("coverage", KeywordOptions(prompt_pattern=_PATTERN, measure="coverage"))
    complete = KeywordReward("complete", KeywordOptions(prompt_pattern=_PATTERN, measure="binary"))
    people = _sentences(sources, complete)
    parts: dict[Part, list[Labelled]] = {"training": [], "judge": [], "held_out": []}
    for item in people:
        rng = random.Random(f"broken {item.prompt} {item.output}")
        parts[part_of(_key(item.prompt))] += [
            Labelled(item, 1.0),
            Labelled(RewardInput(item.prompt, broken_up(item.output, rng)), 0.0),
        ]
    reward = WordModel(parts["training"], View((output_of,), output_shape), strength=10.0)
    usual = Familiarity(row.item.output for row in parts["judge"] if row.target and _is_known(row.item))
    judged = [row for row in parts["judge"] if not _is_known(row.item)]
    judge = TreeModel(judged, View((output_of,), lambda i: [*shape(i.output), *usual.numbers(i.output)]))
    held_out = parts["held_out"]
    return Task(
        name="keywords",
        reward=LongEnough(Product((ordered, reward)), _MIN_WORDS),
        judge=LongEnough(Product((ordered, judge)), _MIN_WORDS),
        train_prompts=distinct([item.prompt for item in people if part_of(_key(item.prompt)) == "training"]),
        held_out_prompts=distinct([item.prompt for item in people if part_of(_key(item.prompt)) == "held_out"]),
        good=[row.item for row in parts["training"] if row.target],
        bad=[row.item for row in parts["training"] if not row.target],
        max_tokens=_MAX_TOKENS,
        stops_at_newline=True,
        measures={
            LONG_ENOUGH: Length(_MIN_WORDS),
            "coverage": coverage,
            "ordered coverage": ordered,
            "complete": complete,
            "acceptable": judge,
        },
        notes={
            "reward": quality(reward.score(rows_of(held_out)), held_out),
            "judge": quality(judge.score(rows_of(held_out)), held_out),
            "of": "acceptability; coverage is exact",
        },
    )


def broken_up(sentence: str, rng: random.Random) -> str:
    """A sentence made unacceptable: reordered, stripped of its small words, stuttering, or cut short."""
    found = sentence.split()
    kind = rng.randrange(5)
    if kind == 0:
        rng.shuffle(found)
    elif kind == 1 and len(found) > 3:
        i = rng.randrange(len(found) - 2)
        found[i : i + 3] = found[i + 2], found[i], found[i + 1]
    elif kind == 2:
        found = content_words(sentence)
    elif kind == 3:
        i = rng.randrange(len(found))
        found[i:i] = found[i : i + rng.randrange(1, 4)] * rng.randrange(1, 3)
    else:
        found = found[: max(2, len(found) // 2)] + found[: max(1, len(found) // 3)]
    if found == sentence.split():  # of words that are alike, or that needed no small ones
        found += found[:2]
    return " " + " ".join(found)


def _sentences(sources: Sources, complete: KeywordReward) -> list[RewardInput]:
    """People's sentences that have all keywords of a set, each with a prompt that names them in its order."""
    found: list[RewardInput] = []
    rows = sorted(read_rows(sources.data, "commongen/concept_sets"), key=lambda row: in_order(row["id"]))
    for row in rows[:_MOST_SETS]:
        for reference in row["references"][:2]:
            order = _order(row["concepts"], reference)
            item = RewardInput(f"Keywords: {', '.join(order)}\nSentence:", f" {reference.strip()}")
            if order and complete.score([item]) == [1.0]:
                found.append(item)
    return found


def _order(concepts: Sequence[str], sentence: str) -> list[str]:
    """The concepts by their first appearance; empty when one of them is not found by its beginning."""
    lower = f" {sentence.lower()}"
    places = {concept: lower.find(f" {concept[:-1] if len(concept) > 3 else concept}") for concept in concepts}
    return [] if -1 in places.values() else sorted(concepts, key=places.__getitem__)


def _key(prompt: str) -> str:
    """The same for all orders of the same keywords."""
    listed = prompt.partition("Keywords: ")[2].partition("\n")[0]
    return ", ".join(sorted(listed.split(", ")))


def _is_known(item: RewardInput) -> bool:
    """Half of the judge's rows say what is usual, the other half are judged by it."""
    return sum(item.prompt.encode()) % 2 == 0
