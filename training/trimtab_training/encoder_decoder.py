"""Base models whose encoder reads the prompt and whose decoder writes the output, such as Blenderbot.

Both classes stand in for what a causal LM does with prompt and output in one sequence. Forced tokens, shortest lengths
and other additions of transformers' `generate` are no part of the base's distribution and are left out, as in serving.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab_adapters.in_process.transformers_base import decoder_start
from trimtab_training.logits_reader import LogitsReader, PaddedReader
from trimtab_training.padding import TokenIds, padded


def has_encoder(model: Any) -> bool:
    """Whether a base is an encoder-decoder model."""
    return bool(model.config.is_encoder_decoder)


class EncoderDecoderReader:
    """A `LogitsReader`: contexts go through the encoder, outputs through the decoder, behind its start token."""

    def __call__(self, model: Any, contexts: Sequence[TokenIds], outputs: Sequence[TokenIds]) -> Tensor:
        """See `LogitsReader`."""
        context_ids, context_mask = padded(contexts, left=False, device=model.device)
        output_ids, _ = padded(outputs, left=False, device=model.device)
        start = output_ids.new_full((len(outputs), 1), decoder_start(model))
        logits: Tensor = model(
            input_ids=context_ids,
            attention_mask=context_mask.long(),
            decoder_input_ids=torch.cat((start, output_ids[:, :-1]), dim=-1),
            use_cache=False,
        ).logits
        return logits


def base_reader(base: Any, otherwise: LogitsReader | None = None) -> LogitsReader:
    """What reads a base: an encoder-decoder one in its own way, any other as `otherwise` says, or padded."""
    return EncoderDecoderReader() if has_encoder(base) else otherwise or PaddedReader()


class CachedDecoder:
    """The decoder with its cache over one batch of contexts, read by the encoder once."""

    def __init__(self, model: Any, contexts: Sequence[TokenIds], device: torch.device) -> None:
        self._model = model
        context_ids, context_mask = padded(contexts, left=False, device=device)
        self._mask = context_mask.long()
        self._encoded = model.get_encoder()(input_ids=context_ids, attention_mask=self._mask)
        self._start = context_ids.new_full((len(contexts),), decoder_start(model))
        self._cache: Any = None

    def next_logits(self, tokens: Tensor | None) -> Tensor:
        """Logits after all tokens so far, `[B, V]`; `tokens` `[B]` are the newest, None at first."""
        output = self._model(
            encoder_outputs=self._encoded,
            attention_mask=self._mask,
            decoder_input_ids=(self._start if tokens is None else tokens)[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits
