"""Tiny random Blenderbots, and what they say of a next token when nothing is cached."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BlenderbotConfig, BlenderbotForConditionalGeneration

from tiny_models import NUM_TOKENS, write_tokenizer

START = 1
"""Token before the first one of an answer."""


def tiny_blenderbot(*, seed: int, vocab_size: int = NUM_TOKENS, max_positions: int = 48, spread: float = 0.25) -> Any:
    """A random Blenderbot whose next-token distributions depend on its whole prompt; the wider the spread of its
    weights, the more peaked they are.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BlenderbotConfig(
            vocab_size=vocab_size,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=max_positions,
            decoder_start_token_id=START,
            bos_token_id=START,
            eos_token_id=0,
            pad_token_id=0,
            forced_eos_token_id=None,
        )
        model = BlenderbotForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, spread)
            model.final_logits_bias.normal_(0.0, 0.5)
    return model


def write_blenderbot(directory: Path, **arguments: Any) -> None:
    """A directory with model and tokenizer."""
    tiny_blenderbot(**arguments).save_pretrained(directory)
    write_tokenizer(directory, arguments.get("vocab_size", NUM_TOKENS))


@torch.inference_mode()
def blenderbot_logprobs(model: Any, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """`[len(output) + 1, V]` next-token log-probabilities after a prompt and each output token: one pass, no cache."""
    logits = model(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=torch.tensor([[START, *output]])).logits
    return torch.log_softmax(logits[0], dim=-1)
