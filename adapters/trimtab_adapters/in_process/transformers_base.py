"""A base LM of transformers in this process, decoder-only or encoder-decoder, one row and one token at a time.

For models that vLLM does not run, such as Blenderbot, the base of the IPA paper's dialogue task. Rows are computed one
after another, so this costs many times what vLLM does for several requests at once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from trimtab_adapters.contract.errors import InvalidRequestError, VocabularyError, WeightsError
from trimtab_adapters.contract.sampling import ContextLimits

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")


class Encoded:
    """What an encoder made of a prompt; rows with the same prompt share it."""

    def __init__(self, output: Any) -> None:
        self.output = output


@dataclass(slots=True, eq=False)
class BaseRow:
    """One answer in the making.

    Attributes:
        num_prompt_tokens: The encoder's part of the tokens.
        cache: Keys and values of what was read; None before the first pass.
        num_read: Tokens that they hold: of prompt and output, or of an encoder-decoder model of its output.
        encoded: The prompt of an encoder-decoder model.
    """

    num_prompt_tokens: int
    cache: Any = None
    num_read: int = 0
    encoded: Encoded | None = None


class TransformersBase:
    """A causal or an encoder-decoder LM. Not for several threads.

    Of an encoder-decoder model the encoder reads the prompt, and the decoder goes on from its start token. What
    `generate` of transformers does besides (forced tokens, shortest lengths, n-gram bans, beams) is no part of it.

    Attributes:
        limits: How long prompt and output may be.
        has_encoder: Whether it is an encoder-decoder model.

    Args:
        model: Of transformers.
        num_tokens: Tokens of the tokenizer; columns beyond it are cut off.
        context: Longest prompt and output together, where the model does not say so itself or less is wanted.

    Raises:
        VocabularyError: The model has fewer columns than the tokenizer tokens.
        InvalidRequestError: Nothing says how long a text may be, or where a decoder starts.
    """

    def __init__(self, model: Any, num_tokens: int, *, context: int | None = None) -> None:
        columns = int(model.get_output_embeddings().weight.shape[0])
        if columns < num_tokens:
            raise VocabularyError(f"the base has logits for {columns} tokens, its tokenizer has {num_tokens}")
        self._model = model.eval().requires_grad_(False)
        self._num_tokens = num_tokens
        self.has_encoder = bool(model.config.is_encoder_decoder)
        self._start = decoder_start(model) if self.has_encoder else 0
        self.limits = _limits(model.config, context)
        self._encoded: WeakValueDictionary[tuple[int, ...], Encoded] = WeakValueDictionary()

    def open(self, num_prompt_tokens: int) -> BaseRow:
        """Begin an answer behind so many tokens, at least one; nothing is computed yet."""
        return BaseRow(num_prompt_tokens)

    @torch.inference_mode()
    def next_logits(self, row: BaseRow, token_ids: Sequence[int]) -> Tensor:
        """Logits of the next token, `[num_tokens]`, float32, on the CPU.

        Args:
            row: As `open` gave it; it remembers what was read.
            token_ids: Prompt and output so far, longer than in the row's last call.
        """
        if self.has_encoder:
            arguments = self._decoder_arguments(row, token_ids)
        else:
            arguments = {"input_ids": self._tensor(token_ids[row.num_read :])}
            row.num_read = len(token_ids)
        output = self._model(**arguments, past_key_values=row.cache, use_cache=True)
        row.cache = output.past_key_values
        logits: Tensor = output.logits[0, -1, : self._num_tokens].float().cpu()
        return logits

    def _decoder_arguments(self, row: BaseRow, token_ids: Sequence[int]) -> dict[str, Any]:
        if row.encoded is None:
            row.encoded = self._encode(tuple(token_ids[: row.num_prompt_tokens]))
        tokens = [self._start, *token_ids[row.num_prompt_tokens :]]
        new, row.num_read = tokens[row.num_read :], len(tokens)
        return {"encoder_outputs": row.encoded.output, "decoder_input_ids": self._tensor(new)}

    def _encode(self, prompt: tuple[int, ...]) -> Encoded:
        found = self._encoded.get(prompt)
        if found is None:
            found = Encoded(self._model.get_encoder()(input_ids=self._tensor(prompt)))
            self._encoded[prompt] = found
        return found

    def _tensor(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(token_ids)], dtype=torch.long, device=self._model.device)


def load_transformers_base(
    source: str, num_tokens: int, *, dtype: Dtype = "auto", device: str = "cpu", context: int | None = None
) -> TransformersBase:
    """Load a base from a directory or the Hub: safetensors only, no remote code.

    Args:
        source: Directory or Hub id.
        num_tokens: Tokens of its tokenizer.
        dtype: Of its weights; `auto` is that of the file.
        device: Where it runs.
        context: See `TransformersBase`.

    Raises:
        InvalidRequestError: It is not a model that transformers can load.
        WeightsError: Weights are missing or do not fit the configuration.
        VocabularyError: It does not fit its tokenizer.
    """
    path = Path(source).expanduser()
    name = str(path) if path.is_dir() else source
    try:
        is_encoder_decoder = AutoConfig.from_pretrained(name, trust_remote_code=False).is_encoder_decoder
        auto: Any = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
        model, report = auto.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        model = model.to(device)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, json.JSONDecodeError) as exc:
        raise InvalidRequestError(f"{source} cannot be loaded as a base model by transformers: {exc}") from exc
    missing, mismatched = sorted(map(str, report["missing_keys"])), sorted(map(str, report["mismatched_keys"]))
    if missing or mismatched:
        raise WeightsError(f"{source}: missing weights {missing[:3]}, wrong shapes {mismatched[:3]}")
    return TransformersBase(model, num_tokens, context=context)


def decoder_start(model: Any) -> int:
    """The token before the first one of a decoder's output. Raises `InvalidRequestError` where nothing names it."""
    for settings in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token_id = getattr(settings, name, None)
            if isinstance(token_id, int):
                return token_id
    raise InvalidRequestError(f"{type(model).__name__} names no decoder_start_token_id, so its answers cannot begin")


def _limits(config: Any, context: int | None) -> ContextLimits:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = [int(value) for name in _POSITIONS if (value := getattr(text, name, None))]
    if not known and context is None:
        raise InvalidRequestError(
            "the base's configuration does not say how long a text may be; set the most tokens of prompt and answer "
            "together (TRIMTAB_TRANSFORMERS_CONTEXT)"
        )
    if config.is_encoder_decoder:
        own = known[0] if known else 1 << 30
        total = min(2 * own, context or 2 * own)
        return ContextLimits(prompt=min(own, total - 1), output=min(own, total - 1), total=total)
    total = min([*known[:1], *([context] if context else [])])
    return ContextLimits.shared(total)
