"""How much of a list of keywords a text covers. Words in, numbers out.

The ordered and the binary measure are those of IPA (arXiv 2305.15065) on CommonGen: keywords are listed by their first
appearance in the text, and that list is compared with the wanted order.
"""

from collections.abc import Sequence

WordKeys = frozenset[str]
"""Forms of one word, such as its own and its lemma; two words match when they share one."""


def first_appearances(keywords: Sequence[Sequence[WordKeys]], words: Sequence[WordKeys]) -> list[int | None]:
    """Where each keyword, of one word or several in a row, first begins in the text; None where it does not."""
    return [_find(keyword, words) for keyword in keywords]


def coverage(places: Sequence[int | None]) -> float:
    """Share of keywords that appear."""
    return sum(place is not None for place in places) / len(places)


def ordered_coverage(places: Sequence[int | None]) -> float:
    """Length of the run, from its first position, on which the order of appearance is the wanted one, as a share."""
    run = 0
    for appeared, wanted in zip(_order(places), range(len(places)), strict=False):
        if appeared != wanted:
            break
        run += 1
    return run / len(places)


def binary_coverage(places: Sequence[int | None]) -> float:
    """1 when all keywords appear and first do so in the wanted order, else 0."""
    return float(_order(places) == list(range(len(places))))


def is_same(one: Sequence[WordKeys], other: Sequence[WordKeys]) -> bool:
    """Whether two keywords are the same, word by word."""
    return len(one) == len(other) and not any(a.isdisjoint(b) for a, b in zip(one, other, strict=True))


def _order(places: Sequence[int | None]) -> list[int]:
    """Keywords that appear, by their first appearance; where two begin at the same word, in the wanted order."""
    found = [(place, keyword) for keyword, place in enumerate(places) if place is not None]
    return [keyword for _, keyword in sorted(found)]


def _find(keyword: Sequence[WordKeys], words: Sequence[WordKeys]) -> int | None:
    for start in range(len(words) - len(keyword) + 1):
        if not any(keyword[i].isdisjoint(words[start + i]) for i in range(len(keyword))):
            return start
    return None
