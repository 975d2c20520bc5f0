"""A LM that steers rows: an adapter version, or the base itself under another prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab_adapters.adapter_lm import PackedLM
from trimtab_adapters.contract.params import VersionId
from trimtab_adapters.kv_pool import KvPool

BASE_EXPERT = "base"
"""Stands where other experts have their version id; it is none, so no version can be taken for it."""


@dataclass(slots=True)
class Activity:
    """What an expert did since it was loaded: `VersionActivity` without the cache."""

    steps: int = 0
    step_seconds: float = 0.0
    rows: int = 0

    def add(self, rows: int, seconds: float) -> None:
        """One pass over so many rows."""
        self.steps += 1
        self.rows += rows
        self.step_seconds += seconds


class Expert:
    """What the steering core knows of a LM.

    Args:
        version: Tells experts apart.
        adapter: Runs packed rows.
        pool: Keys and values of its rows.
        prefix: Token ids that it reads before each row's own.
        num_known: Leading token ids that mean the same in it and in the base.
        cache_root: Name of the empty prefix in the pool.

    Attributes:
        num_rows: Open rows that it steers.
        is_usable: Whether it takes new rows.
    """

    def __init__(
        self,
        version: VersionId,
        adapter: PackedLM,
        pool: KvPool,
        *,
        prefix: Sequence[int],
        num_known: int,
        cache_root: bytes,
    ) -> None:
        self.version = version
        self.adapter = adapter
        self.pool = pool
        self.prefix = list(prefix)
        self.num_known = num_known
        self.cache_root = cache_root
        self.num_rows = 0
        self.is_usable = True
        self.activity = Activity()


def base_expert(lm: PackedLM, pool: KvPool, *, vocab_size: int) -> Expert:
    """The base model's own weights with a KV cache of ours. It is never loaded, committed or retired.

    Args:
        lm: Runs the base over the blocks of a pool.
        pool: For its geometry.
        vocab_size: Width of the base's logits. All of them count, also those beyond the tokenizer: base and negative
            differ by nothing but the prompt.
    """
    num_known = min(lm.num_logits, vocab_size)
    return Expert(BASE_EXPERT, lm, pool, prefix=(), num_known=num_known, cache_root=BASE_EXPERT.encode())
