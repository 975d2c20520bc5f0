"""Rows of the text data, cut into parts by their prompt, so that no prompt serves two ends.

The reward, the policies and the experts are made from one part, the judge from another; accuracies and all results are
measured on the third, which nothing has been trained on.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

Part = Literal["training", "judge", "held_out"]

_TENTHS: Final[tuple[Part, ...]] = ("training",) * 4 + ("judge",) * 4 + ("held_out",) * 2


def read_rows(data: Path, name: str) -> Iterator[dict[str, Any]]:
    """Rows of a file of the text data, such as `commongen/concept_sets`."""
    with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def part_of(key: str) -> Part:
    """The part of a prompt: four tenths of all for training, four for the judge, two held out."""
    return _TENTHS[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % 10]


def in_order(key: str) -> str:
    """A sort key that puts prompts into an order which has nothing to do with what they say."""
    return hashlib.sha256(f"order {key}".encode()).hexdigest()
