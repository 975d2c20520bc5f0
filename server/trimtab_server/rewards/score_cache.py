"""Scores that are known already."""

import hashlib
from collections.abc import Mapping, Sequence

from cachetools import TTLCache

from trimtab_adapters.contract.rewards import RewardInput


class ScoreCache:
    """The latest scores of one reward, bounded in number and age.

    Kept under a hash of version, prompt and output, so that no text stays in memory for it.

    Args:
        max_size: How many to keep; 0 keeps none. The least recently used goes first.
        ttl_s: How long to keep one.
    """

    def __init__(self, *, max_size: int, ttl_s: float) -> None:
        self._scores: TTLCache[bytes, float] = TTLCache(max_size, ttl_s)
        self.num_hits = 0

    def __len__(self) -> int:
        self._scores.expire()
        return len(self._scores)

    def find(self, version: str, inputs: Sequence[RewardInput]) -> dict[RewardInput, float]:
        """Those of the inputs whose scores of this version are known."""
        if not self._scores.maxsize:
            return {}
        found = {}
        for item in dict.fromkeys(inputs):
            score = self._scores.get(_key(version, item))
            if score is not None:
                found[item] = score
        self.num_hits += len(found)
        return found

    def keep(self, version: str, scores: Mapping[RewardInput, float]) -> None:
        """Keep scores of this version."""
        if not self._scores.maxsize:
            return
        for item, score in scores.items():
            self._scores[_key(version, item)] = score


def _key(version: str, item: RewardInput) -> bytes:
    digest = hashlib.sha256()
    for text in (version, item.prompt, item.output):
        data = text.encode(errors="surrogatepass")
        # With its length, so that no text can pass into the next.
        digest.update(len(data).to_bytes(8))
        digest.update(data)
    return digest.digest()
