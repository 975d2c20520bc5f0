"""What builders of tasks are given: the data, and samples of the base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.rows import in_order


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a task's texts come from.

    Attributes:
        data: Directory of the text data.
        draw: One output of the base for each prompt, of at most so many tokens.
        cut: The first so many tokens of a text.
    """

    data: Path
    draw: Callable[[Sequence[str], int], list[str]]
    cut: Callable[[str, int], str]


def distinct(prompts: Sequence[str]) -> list[str]:
    """Different prompts in an order that does not depend on what they say."""
    return sorted(set(prompts), key=in_order)
