"""The base model as an expert under another prompt: what guidance by a negative prompt needs."""

from typing_extensions import override

from trimtab_adapters.adapter_lm import PackedLM
from trimtab_adapters.contract.engine_api import LoadedVersion
from trimtab_adapters.kv_pool import KvPool
from trimtab_adapters.residents import Activity, BaseModel, ResidentVersion

BASE_EXPERT = "base"
"""Stands where other experts have their version id; it is none, so no version can be taken for it."""


class BaseExpert(ResidentVersion):
    """The base model's own weights with a KV cache of ours. It is never loaded, committed or retired.

    Args:
        lm: Runs the base over the blocks of a pool.
        pool: For its geometry; inside the adapter LMs' budget.
        base: Widths of its vocabulary.
    """

    def __init__(self, lm: PackedLM, pool: KvPool, base: BaseModel) -> None:
        self.version = BASE_EXPERT
        self.adapter = lm
        self.pool = pool
        self.prefix = []
        # All of them, also those beyond the tokenizer: base and negative differ by nothing but the prompt.
        self.num_known = min(lm.num_logits, base.vocab_size)
        self.cache_root = BASE_EXPERT.encode()
        self.num_rows = 0
        self.is_usable = True
        self.activity = Activity()

    @override
    def describe(self, state: str = "committed") -> LoadedVersion:
        raise NotImplementedError("the base is no adapter version")
