"""LoRAs on a shared LM by vLLM's CPU operators in bfloat16, against float32 models with the LoRA merged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_directories import merged, write_lora, write_model
from steering_reference import VOCAB_SIZE, base_description, load, params
from trimtab_adapters.adapter_lm import AdapterLM, Backend
from trimtab_adapters.residents import Residents
from trimtab_adapters.steering import SteeringCore
from trimtab_adapters.store import VersionStore

pytest.importorskip("vllm.v1.attention.backends.cpu_attn", reason="vLLM's CPU build is not installed")

from trimtab_adapters.vllm.cpu_attention import CpuKernel
from trimtab_adapters.vllm.cpu_ops import CpuOps

CPU = torch.device("cpu")
RANKS = (1, 3, 8, 16, 33)
"""Also such as do not fill a vector register."""
PROMPTS = [[1 + (11 * n + k) % 120 for k in range(length)] for n, length in enumerate((1, 5, 17, 40, 33, 64, 2))]


@torch.inference_mode()
def logprobs(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens])).logits[0, -1, :VOCAB_SIZE]
    return torch.log_softmax(logits.float(), dim=-1)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_loras_round_as_bfloat16_does_and_no_worse(family: str, tmp_path: Path) -> None:
    if not CpuOps().supports(torch.bfloat16, CPU):
        pytest.skip("this build of vLLM has no oneDNN")
    trunk = write_model(tmp_path / "trunk", family, seed=1, num_attention_heads=2, num_key_value_heads=1)
    residents = Residents(
        base_description(trunk),
        CPU,
        kv_bytes=1 << 24,
        dtype=torch.bfloat16,
        backend=Backend(CpuKernel(), CpuOps()),
    )
    store = VersionStore(tmp_path / "store")
    core = SteeringCore(residents.committed, vocab_size=VOCAB_SIZE)
    loras = [write_lora(tmp_path / f"l{r}", trunk, seed=r, r=r, lora_alpha=2 * r) for r in RANKS]
    versions = [load(residents, store.add(lora, name=lora.name, trunk=trunk)[1]) for lora in loras]
    first = residents.committed[versions[0]].adapter.trunk
    assert isinstance(first, AdapterLM)
    assert isinstance(first.dense, CpuOps)
    assert isinstance(first.kernel, CpuKernel)
    rows = [core.open(params(f"u{n}", (versions[n % 5], 1.0)), prompt, []) for n, prompt in enumerate(PROMPTS)]
    wide = [merged(trunk, lora) for lora in loras]
    narrow = [merged(trunk, lora).to(torch.bfloat16) for lora in loras]
    plain = AutoModelForCausalLM.from_pretrained(trunk, dtype=torch.float32)
    ours: list[float] = []
    rounding: list[float] = []
    effect: list[float] = []
    for _ in range(3):
        logits = torch.zeros(len(rows), VOCAB_SIZE)
        result = core.step([(row, n) for n, row in enumerate(rows)], logits)
        assert result is not None
        assert not result.failed
        for n, row in enumerate(rows):
            want = logprobs(wide[n % 5], row.tokens)
            ours.append(float((logits[n] - want).abs().mean()))
            rounding.append(float((logprobs(narrow[n % 5], row.tokens) - want).abs().mean()))
            effect.append(float((logprobs(plain, row.tokens) - want).abs().mean()))
            row.append([int(want.argmax())])
    # transformers' own bfloat16 with merged weights is the yardstick. Ours rounds once more, where the update is added.
    assert sum(ours) < 2 * sum(rounding), (sum(ours), sum(rounding))
    assert max(ours) < min(effect) / 3, "the LoRA of another row would be as far off as none"
