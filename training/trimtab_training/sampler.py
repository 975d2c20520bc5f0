"""Plain sampling from the tailored policy in this process: static batches, one cache per model."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab_training.encoder_decoder import CachedDecoder, has_encoder
from trimtab_training.interruption import Interruption
from trimtab_training.padding import TokenIds, padded, position_ids
from trimtab_training.policy import TailoredPolicy, evaluating

AllowedTokens = Callable[[Tensor, Tensor | None], Tensor]
"""Asked before each token of one batch with the base logits, `[B, V]`, and the tokens drawn last, `[B]`, None at first;
answers which of the tokenizer's tokens may be drawn now, `[B, num_known]`, at least one in each row."""


class TokenMask(Protocol):
    """What may be drawn from the tailored policy now.

    It is asked anew for each batch, so that what changes it reaches the very next draw. `None` stands for a mask that
    allows every token.
    """

    def begin(self, policy: TailoredPolicy, prompt_token_ids: Sequence[TokenIds]) -> AllowedTokens:
        """Begin a batch of B prompts."""
        ...


@dataclass(frozen=True, slots=True)
class SampledOutput:
    """One output and how likely its tokens were, all of the same length.

    Attributes:
        token_ids: Its tokens.
        steered_logprobs: Of each under the policy that drew it, before temperature and `top_p`; None under a mask,
            which makes it another policy's.
        base_logprobs: Likewise under the base.
    """

    token_ids: tuple[int, ...]
    steered_logprobs: tuple[float, ...] | None
    base_logprobs: tuple[float, ...]


class CachedModel:
    """A causal LM with its cache over one left-padded batch of contexts."""

    def __init__(self, model: Any, contexts: Sequence[TokenIds], device: torch.device) -> None:
        self._model = model
        self._ids, self._mask = padded(contexts, left=True, device=device)
        self._cache: Any = None

    def next_logits(self, tokens: Tensor | None) -> Tensor:
        """Logits after the context and all tokens so far, `[B, A]`; `tokens` `[B]` are the newest, None at first."""
        if tokens is not None:
            self._ids = tokens[:, None]
            self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), dim=-1)
        output = self._model(
            input_ids=self._ids,
            attention_mask=self._mask.long(),
            position_ids=position_ids(self._mask)[:, -self._ids.shape[1] :],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits


def sample_outputs(
    policy: TailoredPolicy,
    prompt_token_ids: Sequence[TokenIds],
    adapter_prefix: TokenIds | None,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    end_token_ids: Collection[int],
    generator: torch.Generator,
    mask: TokenMask | None = None,
    interruption: Interruption | None = None,
) -> list[SampledOutput]:
    """Draw one output for each prompt.

    Args:
        policy: Both models; switched to evaluation mode for the time of the call.
        prompt_token_ids: B prompts of at least one token.
        adapter_prefix: What the adapter sees before each prompt; None draws from the base alone.
        max_tokens: Longest output.
        temperature: Divides the steered logits.
        top_p: Smallest set of most probable tokens that has this much probability is sampled from.
        end_token_ids: Tokens that end an output; the output keeps them.
        generator: Source of randomness, on the CPU.
        mask: What may be drawn; the rest is renormalised before temperature and `top_p` apply.
        interruption: Ends sampling early with `TrainingInterrupted`.

    Returns:
        B outputs of 1 to `max_tokens` tokens, all of them ids of the tokenizer: padding rows of the base's vocabulary
        are never drawn.
    """
    device = policy.device
    ends = torch.tensor(sorted(end_token_ids), dtype=torch.long, device=device)
    is_done = torch.zeros(len(prompt_token_ids), dtype=torch.bool, device=device)
    columns: list[Tensor] = []
    steered_columns: list[Tensor] = []
    base_columns: list[Tensor] = []
    with evaluating(policy.adapter):
        cached = CachedDecoder if has_encoder(policy.base) else CachedModel
        base = cached(policy.base, prompt_token_ids, device)
        adapter = None
        if adapter_prefix is not None:
            adapter = CachedModel(policy.adapter, [(*adapter_prefix, *p) for p in prompt_token_ids], device)
        allowed = mask.begin(policy, prompt_token_ids) if mask is not None else None
        tokens: Tensor | None = None
        while len(columns) < max_tokens and not bool(is_done.all()):
            if interruption is not None:
                interruption.check()
            base_logits = base.next_logits(tokens).float()
            steered = base_logits if adapter is None else policy.steer(base_logits, adapter.next_logits(tokens))
            logits = steered[:, : policy.num_known]
            if allowed is not None:
                logits = logits.masked_fill(~allowed(base_logits, tokens), float("-inf"))
            tokens = _draw(logits / temperature, top_p, generator)
            columns.append(torch.where(is_done, -1, tokens))
            steered_columns.append(_logprobs(steered, tokens))
            base_columns.append(_logprobs(base_logits, tokens))
            is_done = is_done | torch.isin(tokens, ends)
    rows = (torch.stack(found, dim=1).tolist() for found in (columns, steered_columns, base_columns))
    return [_output(*row, is_masked=mask is not None) for row in zip(*rows, strict=True)]


def smallest_set(probabilities: Tensor, *, share: float, min_tokens: int = 1) -> Tensor:
    """The smallest set of most probable tokens that has `share` of the probability, `[..., V]` -> bool `[..., V]`.

    Args:
        probabilities: Each row sums to 1.
        share: 1 keeps every token.
        min_tokens: So many are kept at least, the most probable ones.
    """
    if share >= 1.0:
        return torch.ones_like(probabilities, dtype=torch.bool)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    is_kept = ordered.cumsum(dim=-1) - ordered < share
    is_kept[..., :min_tokens] = True
    return torch.zeros_like(is_kept).scatter(-1, order, is_kept)


def _output(tokens: list[int], steered: list[float], base: list[float], *, is_masked: bool) -> SampledOutput:
    """A row without what was drawn behind its end."""
    token_ids = tuple(token for token in tokens if token >= 0)
    length = len(token_ids)
    return SampledOutput(token_ids, None if is_masked else tuple(steered[:length]), tuple(base[:length]))


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each row's token, `[B, V]`, `[B]` -> `[B]`."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)


def _draw(logits: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row, `[B, V]` -> `[B]`."""
    probabilities = torch.softmax(logits, dim=-1).cpu()
    if top_p < 1.0:
        probabilities = probabilities.masked_fill(~smallest_set(probabilities, share=top_p), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
