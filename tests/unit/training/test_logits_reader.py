from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab_training.base_logits_cache import BaseLogitsCache
from trimtab_training.logits_reader import PackedReader, PaddedReader, packs
from trimtab_training.policy import TailoredPolicy

CONTEXTS = [(1, 2, 3), (4,), (5, 6, 7, 8, 9), (10, 11)]
OUTPUTS = [(3, 1), (2, 2, 2, 2), (1,), (9, 8, 7)]


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def compared(got: torch.Tensor, expected: torch.Tensor) -> None:
    for row, output in enumerate(OUTPUTS):  # what is beyond an output is free
        torch.testing.assert_close(got[row, : len(output)], expected[row, : len(output)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["base", "untied", "gpt2"])
@pytest.mark.parametrize("max_tokens", [4, 9, 2048])
def test_packed_rows_give_what_padded_rows_give(model_dirs: dict[str, Path], name: str, max_tokens: int) -> None:
    model = load(model_dirs[name])
    with torch.no_grad():
        expected = PaddedReader()(model, CONTEXTS, OUTPUTS)
        compared(PackedReader(max_tokens)(model, CONTEXTS, OUTPUTS), expected)
        for row, (context, output) in enumerate(zip(CONTEXTS, OUTPUTS, strict=True)):
            alone = model(torch.tensor([[*context, *output]])).logits[0, len(context) - 1 : -1]
            torch.testing.assert_close(expected[row, : len(output)], alone, rtol=1e-4, atol=1e-5)


def test_packed_rows_have_the_gradient_of_padded_rows(model_dirs: dict[str, Path]) -> None:
    gradients = []
    for reader in (PaddedReader(), PackedReader(9)):
        adapter = load(model_dirs["adapter"]).requires_grad_(True)
        policy = TailoredPolicy(load(model_dirs["base"]), adapter, alpha=0.7, num_known=60, reader=reader)
        steered, _ = policy.forward(CONTEXTS, OUTPUTS, [(61,)] * 4).token_logprobs()
        steered.sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for padded, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-3, atol=1e-5)


def test_rows_share_a_sequence_as_long_as_they_fit() -> None:
    assert list(packs([3, 9, 4, 1, 20, 5], 10)) == [[4], [1, 3], [5, 2], [0]]


def test_gradient_checkpointing_and_lower_precision_keep_the_gradient(model_dirs: dict[str, Path]) -> None:
    """bfloat16 has eight bits: a gradient's direction is kept to a cosine above 0.99, float32 to rounding."""
    gradients = []
    for checkpointed, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16)):
        adapter = load(model_dirs["adapter"]).requires_grad_(True).train()
        if checkpointed:
            adapter.gradient_checkpointing_enable()
        policy = TailoredPolicy(load(model_dirs["base"]), adapter, alpha=1.0, num_known=60, compute_dtype=dtype)
        steered, _ = policy.forward(CONTEXTS, OUTPUTS, [()] * 4).token_logprobs()
        steered.sum().backward()  # type: ignore[no-untyped-call]
        assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()]))
    plain, checkpointed_one, lower = gradients
    torch.testing.assert_close(checkpointed_one, plain, rtol=1e-5, atol=1e-6)
    assert float(torch.cosine_similarity(plain, lower, dim=0)) > 0.99
    assert not torch.equal(plain, lower)


class Counting:
    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, model: Any, contexts: Any, outputs: Any) -> torch.Tensor:
        self.rows.append(len(contexts))
        return PaddedReader()(model, contexts, outputs)


def test_rows_that_were_read_before_are_not_read_again(model_dirs: dict[str, Path]) -> None:
    model, counting = load(model_dirs["base"]), Counting()
    cache = BaseLogitsCache(counting, max_bytes=1 << 20)
    with torch.no_grad():
        expected = PaddedReader()(model, CONTEXTS, OUTPUTS)
        compared(cache(model, CONTEXTS, OUTPUTS), expected)
        order = [2, 0, 2]
        again = cache(model, [CONTEXTS[i] for i in order], [OUTPUTS[i] for i in order])
        mixed = cache(model, [*CONTEXTS, (7, 7)], [*OUTPUTS, (1, 2)])
    assert counting.rows == [4, 1]
    assert (cache.num_hits, cache.num_misses) == (7, 5)
    torch.testing.assert_close(again[1, :2], expected[0, :2], rtol=1e-4, atol=1e-5)
    compared(mixed, expected)
    assert cache.num_bytes == sum(len(output) for output in (*OUTPUTS, (1, 2))) * 64 * 4


def test_the_cache_keeps_to_its_budget_and_drops_what_was_not_read_for_longest(model_dirs: dict[str, Path]) -> None:
    model, counting = load(model_dirs["base"]), Counting()
    row_bytes = 2 * 64 * 4
    cache = BaseLogitsCache(counting, max_bytes=2 * row_bytes)
    with torch.no_grad():
        for context in ((1,), (2,), (1,), (3,), (1,), (2,)):  # 3 drops 2, which was read before 1
            cache(model, [context], [(5, 6)])
            assert cache.num_bytes <= 2 * row_bytes
    assert cache.num_misses == 4
    assert cache.num_bytes == 2 * row_bytes
