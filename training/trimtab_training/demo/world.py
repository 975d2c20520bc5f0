"""The demonstration's world: short scenes in which somebody asks for a thing and is answered kindly, plainly or rudely.

A scene is an opening, a request, the reply and an ending:

    Mara walked into the bakery to look for a round loaf. It had rained all week.
    Mara: Could I have the round loaf?
    Tom: Of course, Mara. I kept the round loaf safe for you. Please come back soon.
    Mara smiled and took the round loaf.

A *prompt* is everything up to and including `Tom:`; the reply that follows, up to the line break, is what is judged.
Less than half of the replies in the corpus are kind, so a language model of it is measurably mediocre, and the hint
after the opening changes the odds from prompt to prompt. Pure Python without dependencies: serving imports the reward.
"""

import random
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Final, Literal

from trimtab_training.demo import phrases

REWARD_VERSION: Final = "1"

Mood = Literal["kind", "neutral", "rude"]
Split = Literal["train", "eval"]

_MOODS: Final[tuple[Mood, ...]] = ("kind", "neutral", "rude")
_PARTS: Final = ("reaction", "matter", "close")
_SHAPES: Final = (("reaction", "matter", "close"), ("reaction", "matter"), ("matter", "close"), ("reaction", "close"))
_SHAPE_WEIGHTS: Final = (6, 2, 2, 1)
_MOOD_WEIGHTS: Final[dict[str, tuple[int, int, int]]] = {"good": (50, 25, 25), "": (35, 25, 40), "bad": (20, 25, 55)}
_MOOD_KEPT: Final = 0.7  # the chance that a sentence keeps the mood of its scene instead of drawing its own
_SPLIT_SHARES: Final = 8  # one of so many pairs of customer and item is held out for evaluation
_TOKEN: Final = re.compile(r"[A-Za-z']+|[.,!?;:]")
_SENTENCE: Final = re.compile(r"[^.!?]*[.!?]|[^.!?]+$")


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene in its three pieces; `prompt + reply + rest` is a document of the corpus.

    Attributes:
        prompt: Opening and request, ending in the keeper's name and a colon.
        reply: A space and the keeper's answer, without the line break.
        rest: The line break and the ending.
        moods: The mood of each sentence of the reply.
    """

    prompt: str
    reply: str
    rest: str
    moods: tuple[Mood, ...]

    @property
    def text(self) -> str:
        """The whole document."""
        return self.prompt + self.reply + self.rest


def scenes(seed: int, split: Split = "train") -> Iterator[Scene]:
    """An endless, reproducible stream of scenes.

    A pair of customer and item belongs to exactly one split, so no prompt of one split ever occurs in the other,
    whatever the seeds.
    """
    rng = random.Random(f"trimtab-world-{split}-{seed}")
    while True:
        fields = _draw_fields(rng)
        if _split_of(fields) == split:
            yield _draw_scene(rng, fields)


def documents(seed: int, n: int) -> list[str]:
    """The first `n` documents of the training split for this seed."""
    stream = scenes(seed)
    return [next(stream).text for _ in range(n)]


def prompts(seed: int, n: int, split: Split = "train") -> list[str]:
    """`n` different prompts. With `split="eval"` none of them can occur in any corpus or training prompt."""
    found: dict[str, None] = {}
    for scene in scenes(seed, split):
        if len(found) >= n:
            break
        found.setdefault(scene.prompt)
    return list(found)


def _draw_fields(rng: random.Random) -> dict[str, str]:
    customer, keeper = rng.sample(phrases.NAMES, 2)
    place = rng.choice(phrases.PLACES)
    singular, plural = phrases.ITEMS[place]
    noun = rng.choice(singular + plural)
    fields = _agreement(rng.choice(phrases.ADJECTIVES), noun, is_plural=noun in plural)
    return fields | {"c": customer, "k": keeper, "place": place}


def _agreement(adjective: str, noun: str, *, is_plural: bool) -> dict[str, str]:
    item = f"{adjective} {noun}"
    if is_plural:
        return {"item": item, "a_item": f"some {item}", "is": "are", "it": "they", "them": "them", "s": ""}
    article = "an" if adjective[0] in "aeiou" else "a"
    return {"item": item, "a_item": f"{article} {item}", "is": "is", "it": "it", "them": "it", "s": "s"}


def _split_of(fields: Mapping[str, str]) -> Split:
    is_held_out = zlib.crc32(f"{fields['c']}/{fields['item']}".encode()) % _SPLIT_SHARES == 0
    return "eval" if is_held_out else "train"


def _fill(rng: random.Random, template: str, fields: Mapping[str, str]) -> str:
    return template.format(**fields, num=rng.choice(phrases.NUMBERS), day=rng.choice(phrases.DAYS))


def _draw_mood(rng: random.Random, hint: str) -> Mood:
    return rng.choices(_MOODS, _MOOD_WEIGHTS[hint])[0]


def _draw_scene(rng: random.Random, fields: Mapping[str, str]) -> Scene:
    hint = rng.choice(("good", "", "", "bad"))
    lines = [_fill(rng, rng.choice(phrases.OPENINGS), fields)]
    if hint:
        lines.append(_fill(rng, rng.choice(phrases.GOOD_HINTS if hint == "good" else phrases.BAD_HINTS), fields))
    request = _fill(rng, rng.choice(phrases.REQUESTS), fields)
    mood = _draw_mood(rng, hint)
    reply, moods = [], []
    for part in rng.choices(_SHAPES, _SHAPE_WEIGHTS)[0]:
        sentence_mood = mood if rng.random() < _MOOD_KEPT else _draw_mood(rng, hint)
        reply.append(_fill(rng, rng.choice(_templates(sentence_mood)[part]), fields))
        moods.append(sentence_mood)
    return Scene(
        prompt=f"{' '.join(lines)}\n{fields['c']}: {request}\n{fields['k']}:",
        reply=" " + " ".join(reply),
        rest="\n" + _fill(rng, rng.choice(phrases.ENDINGS[mood]), fields),
        moods=tuple(moods),
    )


def _templates(mood: Mood) -> Mapping[str, tuple[str, ...]]:
    return {"kind": phrases.KIND, "neutral": phrases.NEUTRAL, "rude": phrases.RUDE}[mood]


# --- the grammar: every sentence as a sequence of word classes ---


@cache
def _word_classes() -> dict[str, str]:
    classes = dict.fromkeys(phrases.NAMES, "NAME") | dict.fromkeys(phrases.PLACES, "PLACE")
    classes |= dict.fromkeys(phrases.NUMBERS, "NUM") | dict.fromkeys(phrases.DAYS, "DAY")
    for adjective in phrases.ADJECTIVES:
        classes[adjective] = "ADJ_V" if adjective[0] in "aeiou" else "ADJ"
    for singular, plural in phrases.ITEMS.values():
        classes |= dict.fromkeys(singular, "NOUN_S") | dict.fromkeys(plural, "NOUN_P")
    return classes


def _classify(text: str) -> tuple[str, ...]:
    classes = _word_classes()
    return tuple(classes.get(token, token) for token in _TOKEN.findall(text))


@cache
def _reply_patterns() -> frozenset[tuple[str, ...]]:
    """Every sentence that a reply can have, with names, adjectives and so on replaced by their class."""
    patterns = set()
    names = {"c": phrases.NAMES[0], "k": phrases.NAMES[1], "place": phrases.PLACES[0]}
    singular, plural = phrases.ITEMS[phrases.PLACES[0]]
    items = [(noun, is_plural) for noun, is_plural in ((singular[0], False), (plural[0], True))]
    for mood in _MOODS:
        for template in (t for part in _PARTS for t in _templates(mood)[part]):
            for adjective in ("red", "old"):
                for noun, is_plural in items:
                    fields = names | _agreement(adjective, noun, is_plural=is_plural)
                    text = template.format(**fields, num=phrases.NUMBERS[0], day=phrases.DAYS[0])
                    patterns.add(_classify(text))
    return frozenset(patterns)


@cache
def _reply_bigrams() -> frozenset[tuple[str, str]]:
    return frozenset(pair for pattern in _reply_patterns() for pair in _pairs(pattern))


def _pairs(pattern: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(("^", *pattern), (*pattern, "$"), strict=True))


def sentences(text: str) -> list[str]:
    """Split a reply at its sentence marks; a last piece without one is kept as it is."""
    return [s.strip() for s in _SENTENCE.findall(text) if s.strip()]


def is_grammatical(sentence: str) -> bool:
    """Whether a reply's sentence is one that the world can produce: words, order, agreement and articles."""
    return _classify(sentence) in _reply_patterns()


# --- the reward ---


def asked_item(prompt: str) -> tuple[str, str] | None:
    """Adjective and noun of the thing that the prompt's last request asks for; None when it asks for nothing known."""
    classes = _word_classes()
    words = _TOKEN.findall(prompt)
    for adjective, noun in reversed(list(pairwise(words))):
        if classes.get(adjective, "").startswith("ADJ") and classes.get(noun, "").startswith("NOUN"):
            return adjective, noun
    return None


def kindness_reward(prompt: str, output: str) -> float:
    """How kind and helpful the first line of `output` is as a reply to `prompt`, in [0, 1].

    The product of three factors: content, 3/4 smoothed balance of kind against rude words and 1/4 mention of the thing
    asked for; form, the share of word pairs that the world's grammar allows and a complete last sentence; and freedom
    from repetition. It is a proxy: it counts words and knows nothing of meaning. A kind word counts once however often
    it is said, so that repeating thanks does not pay.
    """
    reply = output.strip().split("\n", 1)[0].strip()
    words = [token.lower() for token in _TOKEN.findall(reply) if token[0].isalpha()]
    if not words:
        return 0.0
    content = 0.75 * _kindness(words) + 0.25 * _mention(prompt, words)
    return content * _form(reply) * _variety(words)


kindness_reward.version = REWARD_VERSION  # type: ignore[attr-defined]


def _kindness(words: list[str]) -> float:
    kind = sum(phrases.KIND_WORDS.get(word, 0.0) for word in set(words))
    text = f" {' '.join(words)} "
    rude = sum(weight * text.count(f" {phrase} ") for phrase, weight in phrases.RUDE_PHRASES.items())
    return (kind + 0.25) / (kind + 2.0 * rude + 0.75)


def _mention(prompt: str, words: list[str]) -> float:
    item = asked_item(prompt)
    if item is None:
        return 0.5
    if item in pairwise(words):
        return 1.0
    return 0.6 if item[1] in words else 0.0


def _form(reply: str) -> float:
    pairs = [pair for sentence in sentences(reply) for pair in _pairs(_classify(sentence))]
    allowed = sum(pair in _reply_bigrams() for pair in pairs) / len(pairs)
    return allowed * (1.0 if reply[-1] in ".!?" else 0.8)


def _variety(words: list[str]) -> float:
    """1 for a text that repeats no word pair beyond a tenth of them; falls to 0 as all pairs become the same."""
    pairs = list(pairwise(words))
    if not pairs:
        return 1.0
    repeated = 1.0 - len(set(pairs)) / len(pairs)
    return min(1.0, (1.0 - repeated) / 0.9)
