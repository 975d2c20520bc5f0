"""Openings of children's stories as prompts, from the text data beside the repository."""

import gzip
import json
import random
from pathlib import Path


def openings(data: Path, num: int, *, seed: int = 0, num_words: int = 14) -> list[str]:
    """The first words of `num` different stories of the set `tinystories`.

    Args:
        data: Directory of the text data.
        num: How many.
        seed: Chooses which.
        num_words: Words of each; half of them must not be shared with an opening taken before.
    """
    with gzip.open(data / "tinystories" / "stories.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [row["text"] for row in rows if row["boundaries"] == "exact"]
    random.Random(seed).shuffle(texts)
    taken: dict[str, str] = {}
    for text in texts:
        words = text.split()
        if len(words) >= num_words:
            taken.setdefault(" ".join(words[num_words // 2 : num_words]), " ".join(words[:num_words]))
        if len(taken) == num:
            return list(taken.values())
    raise ValueError(f"{data} has {len(taken)} different story openings, not {num}")
