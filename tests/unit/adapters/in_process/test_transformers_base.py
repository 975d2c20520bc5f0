"""A base of transformers in this process gives, token by token, what one pass over the whole text gives."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_blenderbot import START, blenderbot_logprobs, tiny_blenderbot, write_blenderbot
from tiny_models import NUM_TOKENS, TinyModels
from trimtab_adapters.contract.errors import InvalidRequestError, VocabularyError, WeightsError
from trimtab_adapters.contract.sampling import ContextLimits
from trimtab_adapters.in_process.transformers_base import TransformersBase, decoder_start, load_transformers_base

PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24]]
OUTPUTS = [[30, 31, 32, 33], [40, 41], [50, 51, 52]]


def test_a_decoder_goes_on_from_what_the_encoder_read() -> None:
    """Rows take turns, as they do in the engine, and each is at another place."""
    model = tiny_blenderbot(seed=1)
    base = TransformersBase(model, NUM_TOKENS)
    rows = [base.open(len(prompt)) for prompt in PROMPTS]
    for place in range(max(map(len, OUTPUTS)) + 1):
        for row, prompt, output in zip(rows, PROMPTS, OUTPUTS, strict=True):
            if place > len(output):
                continue
            logits = base.next_logits(row, [*prompt, *output[:place]])
            expected = blenderbot_logprobs(model, prompt, output)[place]
            torch.testing.assert_close(torch.log_softmax(logits, dim=-1), expected, atol=1e-5, rtol=0.0)


def test_an_answer_that_was_begun_is_the_decoders(tmp_path: Path) -> None:
    """Its first call has prompt and three tokens of the answer; the encoder sees the prompt alone."""
    model = tiny_blenderbot(seed=1)
    base = TransformersBase(model, NUM_TOKENS)
    logits = base.next_logits(base.open(3), [5, 6, 7, 30, 31, 32])
    expected = blenderbot_logprobs(model, [5, 6, 7], [30, 31, 32])[-1]
    torch.testing.assert_close(torch.log_softmax(logits, dim=-1), expected, atol=1e-5, rtol=0.0)
    assert float((expected - blenderbot_logprobs(model, [5, 6, 7, 30, 31, 32], [])[-1]).abs().max()) > 0.1


def test_a_causal_lm_is_read_on_from_its_cache(tiny_models: TinyModels) -> None:
    base = load_transformers_base(str(tiny_models.base), NUM_TOKENS, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tiny_models.base, dtype=torch.float32)
    rows = [base.open(len(prompt)) for prompt in PROMPTS]
    for place in range(3):
        for row, prompt, output in zip(rows, PROMPTS, OUTPUTS, strict=True):
            tokens = [*prompt, *output[:place]]
            with torch.no_grad():
                expected = plain(torch.tensor([tokens])).logits[0, -1]
            torch.testing.assert_close(base.next_logits(row, tokens), expected, atol=1e-4, rtol=0.0)
    assert not base.has_encoder
    assert base.limits == ContextLimits(prompt=511, output=511, total=512)


def test_a_prompt_is_encoded_once_for_all_its_rows_and_forgotten_with_them() -> None:
    model = tiny_blenderbot(seed=1)
    calls: list[int] = []
    model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    base = TransformersBase(model, NUM_TOKENS)
    rows = [base.open(3) for _ in range(3)]
    for row in rows:
        base.next_logits(row, [5, 6, 7])
    other = base.open(3)
    base.next_logits(other, [5, 6, 8])
    assert len(calls) == 2
    del rows, row, other
    gc.collect()
    base.next_logits(base.open(3), [5, 6, 7])
    assert len(calls) == 3


def test_columns_beyond_the_tokenizer_are_cut_off() -> None:
    base = TransformersBase(tiny_blenderbot(seed=1, vocab_size=NUM_TOKENS + 8), NUM_TOKENS)
    assert base.next_logits(base.open(1), [5]).shape == (NUM_TOKENS,)


def test_how_long_texts_may_be() -> None:
    """Encoder and decoder have 48 positions each."""
    model = tiny_blenderbot(seed=1)
    assert TransformersBase(model, NUM_TOKENS).limits == ContextLimits(prompt=48, output=48, total=96)
    assert TransformersBase(model, NUM_TOKENS, context=60).limits == ContextLimits(prompt=48, output=48, total=60)
    assert TransformersBase(model, NUM_TOKENS, context=20).limits == ContextLimits(prompt=19, output=19, total=20)
    model.config.max_position_embeddings = 0
    with pytest.raises(InvalidRequestError, match="TRANSFORMERS_CONTEXT"):
        TransformersBase(model, NUM_TOKENS)
    assert TransformersBase(model, NUM_TOKENS, context=20).limits.total == 20


def test_a_model_that_cannot_be_a_base_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="129"):
        TransformersBase(tiny_blenderbot(seed=1), NUM_TOKENS + 1)
    model = tiny_blenderbot(seed=1)
    assert decoder_start(model) == START
    model.generation_config.decoder_start_token_id = model.generation_config.bos_token_id = None
    for name in ("decoder_start_token_id", "bos_token_id"):
        object.__setattr__(model.config, name, None)  # as other architectures' configurations may have it
    with pytest.raises(InvalidRequestError, match="decoder_start_token_id"):
        TransformersBase(model, NUM_TOKENS)
    with pytest.raises(InvalidRequestError, match="cannot be loaded"):
        load_transformers_base(str(tmp_path), NUM_TOKENS)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_blenderbot(tmp_path, seed=1)
    path = tmp_path / "model.safetensors"
    tensors: dict[str, Any] = load_file(path)
    del tensors["model.encoder.layers.0.fc1.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="missing weights"):
        load_transformers_base(str(tmp_path), NUM_TOKENS)
