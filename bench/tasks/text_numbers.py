"""Plain numbers about a text, or about an output beside its prompt: what classifiers see besides n-grams."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from trimtab_adapters.contract.rewards import RewardInput

_WORD = re.compile(r"\w+(?:['-]\w+)*")
_FUNCTION_WORDS = frozenset(
    """
    a an the and or but if of to in on at by for with from as is are was were be been being am do does did has have had
    i you he she it we they me him her us them my your his its our their this that these those not no so than then
    there here who which what when where how why will would can could should may might must up out off over into
    """.split()  # noqa: SIM905 - a list of a hundred literals is no better to read
)


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def content_words(text: str) -> list[str]:
    """Words that carry meaning of their own."""
    return [word for word in words(text) if word not in _FUNCTION_WORDS]


def shape(text: str) -> list[float]:
    """Number of words, share of different ones, of function words and of words that repeat the one before."""
    found = words(text)
    num = max(1, len(found))
    repeats = sum(a == b for a, b in itertools.pairwise(found))
    return [
        float(len(found)),
        len(set(found)) / num,
        sum(word in _FUNCTION_WORDS for word in found) / num,
        repeats / num,
    ]


def support(source: str, text: str) -> list[float]:
    """How far a text rests on a source.

    Returns:
        Shares of its content words, of its pairs and of its triples of words that the source has, its longest run of
        words from the source as a share, and the number of content words that the source lacks. All 0 for no words.
    """
    given, found = words(source), words(text)
    content, known = content_words(text), set(given)
    new = sum(word not in known for word in content)
    return [
        (len(content) - new) / max(1, len(content)),
        share_of_runs(given, found, 2),
        share_of_runs(given, found, 3),
        longest_common_run(given, found) / max(1, len(found)),
        float(new),
    ]


def share_of_runs(given: Sequence[str], found: Sequence[str], length: int) -> float:
    """Share of the runs of `length` words of `found` that `given` has too; 0 when there is none."""
    known = set(_runs(given, length))
    runs = list(_runs(found, length))
    return sum(run in known for run in runs) / max(1, len(runs))


def longest_common_run(one: Sequence[str], other: Sequence[str]) -> int:
    """Words of the longest run that both have."""
    best, previous = 0, [0] * (len(other) + 1)
    for word in one:
        current = [0] * (len(other) + 1)
        for j, candidate in enumerate(other):
            if word == candidate:
                current[j + 1] = previous[j] + 1
                best = max(best, current[j + 1])
        previous = current
    return best


class Familiarity:
    """How usual the order of words is, from counts over some texts.

    Args:
        texts: What is usual.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._runs: dict[int, Counter[tuple[str, ...]]] = {length: Counter() for length in (1, 2, 3)}
        for text in texts:
            marked = _marked(text)
            for length, counter in self._runs.items():
                counter.update(_runs(marked, length))

    def numbers(self, text: str) -> list[float]:
        """Shares of pairs and triples of words that have been seen, and of pairs that have not though both words have.

        The beginning and the end of a text count as words.
        """
        marked = _marked(text)
        pairs, triples = list(_runs(marked, 2)), list(_runs(marked, 3))
        odd = sum(pair not in self._runs[2] and all((word,) in self._runs[1] for word in pair) for pair in pairs)
        return [
            sum(pair in self._runs[2] for pair in pairs) / max(1, len(pairs)),
            sum(triple in self._runs[3] for triple in triples) / max(1, len(triples)),
            odd / max(1, len(pairs)),
        ]


def output_shape(item: RewardInput) -> list[float]:
    """`shape` of the output."""
    return shape(item.output)


def output_support(item: RewardInput) -> list[float]:
    """`shape` of the output and its `support` by the prompt."""
    return [*shape(item.output), *support(item.prompt, item.output)]


def _marked(text: str) -> list[str]:
    return ["<", *words(text), ">"]


def _runs(found: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    return (tuple(found[i : i + length]) for i in range(len(found) - length + 1))
