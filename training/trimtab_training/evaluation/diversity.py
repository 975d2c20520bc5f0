"""How different the outputs for one prompt are."""

from collections import Counter
from collections.abc import Sequence


def distinct_n(outputs: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams of tokens over all n-grams of all outputs together; None when no output is that long.

    It falls with the number of outputs, so only figures over equally many outputs can be compared.
    """
    ngrams = [tuple(output[i : i + n]) for output in outputs for i in range(len(output) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def repeat_rate(outputs: Sequence[Sequence[int]]) -> float | None:
    """Share of the pairs of outputs that are equal token for token; None with fewer than two outputs.

    Of independent samples it is unbiased for the probability that two of them are the same, however many there are.
    """
    num = len(outputs)
    if num < 2:
        return None
    counts = Counter(tuple(output) for output in outputs)
    return sum(count * (count - 1) for count in counts.values()) / (num * (num - 1))
