"""The loop of the published code: two Hugging Face models, one static batch, a `DynamicCache` each."""

import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from harness.systems import System, Timing, Work


class HfLoop:
    """Base and adapter LM stepped side by side; the logits are mixed in float32."""

    def __init__(self, system: System) -> None:
        self._models = [
            AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="sdpa").eval()
            for path in (system.model, *system.adapters[:1])
        ]

    @torch.inference_mode()
    def run(self, work: Work) -> Timing:
        ids = torch.tensor(work.prompts)
        caches = [DynamicCache() for _ in self._models]
        steps: list[float] = []
        started = before = time.perf_counter()
        first = 0.0
        for step in range(work.num_tokens):
            base, adapter = (
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
                for model, cache in zip(self._models, caches, strict=True)
            )
            ids = (base + torch.log_softmax(adapter, dim=-1)).argmax(dim=-1, keepdim=True)
            ids.tolist()
            now = time.perf_counter()
            if step == 0:
                first = now - started
            else:
                steps.append(now - before)
            before = now
        return Timing(first_s=first, step_s=steps)
