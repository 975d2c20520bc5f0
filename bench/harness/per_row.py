"""A simple logits processor, as one would write it first: one Hugging Face cache and one forward pass per row."""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from typing_extensions import override
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


class PerRowProcessor(LogitsProcessor):
    """Steers every row by one adapter LM with alpha 1. Knows nothing of preemption or discarded samples."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        model = AutoModelForCausalLM.from_pretrained(os.environ["TRIMTAB_BENCH_ADAPTER"], dtype="auto")
        self._model = model.eval()
        self._rows: dict[int, tuple[list[int], list[int], DynamicCache, list[int]]] = {}

    @override
    def is_argmax_invariant(self) -> bool:
        return False

    @override
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, _, prompt, output in batch_update.added:
            self._rows[index] = (list(prompt or ()), output, DynamicCache(), [0])
        for source, target, _ in batch_update.moved:
            self._rows[target] = self._rows.pop(source)

    @override
    def apply(self, logits: Tensor) -> Tensor:
        for index, (prompt, output, cache, seen) in self._rows.items():
            tokens = prompt + output
            new = tokens[seen[0] :] or tokens[-1:]
            seen[0] = len(tokens)
            result = self._model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
            logits[index] += torch.log_softmax(result.logits[0, -1].float(), dim=-1)
        return logits
