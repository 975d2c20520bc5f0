"""The tailored policy in training: a frozen base LM and a trainable adapter LM, combined by `mixing.py`."""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from trimtab_adapters import mixing
from trimtab_training.encoder_decoder import base_reader as default_reader
from trimtab_training.encoder_decoder import has_encoder
from trimtab_training.logits_reader import LogitsReader, PaddedReader
from trimtab_training.models import max_positions
from trimtab_training.padding import TokenIds, padded


@dataclass(frozen=True, slots=True)
class PolicyOutput:
    """Both distributions at each output token. B = rows, T = longest output, V = width of the base logits.

    Attributes:
        steered_logits: `[B, T, V]`, float32, unnormalised; carries the adapter's gradient.
        base_logits: `[B, T, V]`, float32, unnormalised, no gradient.
        output_token_ids: `[B, T]`, 0 where padded.
        mask: `[B, T]`, True at real output tokens.
    """

    steered_logits: Tensor
    base_logits: Tensor
    output_token_ids: Tensor
    mask: Tensor

    def token_logprobs(self) -> tuple[Tensor, Tensor]:
        """Steered and base log-probability of each output token, `[B, T]` each, 0 where padded."""
        index = self.output_token_ids[..., None]
        steered = torch.log_softmax(self.steered_logits, dim=-1).gather(-1, index)[..., 0]
        base = torch.log_softmax(self.base_logits, dim=-1).gather(-1, index)[..., 0]
        return steered.masked_fill(~self.mask, 0.0), base.masked_fill(~self.mask, 0.0)

    def kl(self) -> Tensor:
        """KL(steered || base) of each output position in nats, `[B, T]`, 0 where padded."""
        return mixing.kl_to_base(self.steered_logits, self.base_logits).masked_fill(~self.mask, 0.0)

    def entropy(self) -> Tensor:
        """Entropy of the tailored policy at each output position in nats, `[B, T]`, 0 where padded."""
        logprobs = torch.log_softmax(self.steered_logits, dim=-1)
        # 0 * (-inf) of a token that the base forbids counts as 0, in value and in gradient.
        finite = logprobs.masked_fill(torch.isneginf(logprobs), 0.0)
        return -(logprobs.exp() * finite).sum(dim=-1).masked_fill(~self.mask, 0.0)


class TailoredPolicy:
    """pi = softmax(z_base + alpha * log_softmax(z_adapter)), the product of experts of IPA.

    Args:
        base: Causal or encoder-decoder LM of transformers. Its parameters are frozen here.
        adapter: Causal LM of transformers; the only part with gradients.
        alpha: Weight of the adapter's log-probabilities, negative allowed.
        num_known: Number of tokens of the shared tokenizer. Columns of the adapter beyond it (padding, control
            tokens) are cut off before its log-softmax.
        reader: How the adapter reads a batch; padded when not given.
        base_reader: Likewise the base.
        compute_dtype: Type of the adapter's forward and backward pass; its weights keep theirs.
    """

    def __init__(
        self,
        base: Any,
        adapter: Any,
        *,
        alpha: float,
        num_known: int,
        reader: LogitsReader | None = None,
        base_reader: LogitsReader | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.base = base.eval().requires_grad_(False)
        self.adapter = adapter
        self.alpha = alpha
        self.num_known = num_known
        self._reader = reader or PaddedReader()
        self._base_reader = base_reader or default_reader(base, self._reader)
        self._compute_dtype = compute_dtype

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        device: torch.device = self.adapter.device
        return device

    @property
    def vocab_size(self) -> int:
        """V, the width of the base logits."""
        return int(self.base.get_output_embeddings().weight.shape[0])

    def fits(self, num_prefix: int, num_prompt: int, num_output: int) -> bool:
        """Whether both models have positions for a row: the adapter for all of it, the base for prompt and output.

        Of an encoder-decoder base prompt and output have positions of their own.
        """
        whole = num_prompt + num_output
        base = max(num_prompt, num_output) if has_encoder(self.base) else whole
        limits = ((max_positions(self.adapter), num_prefix + whole), (max_positions(self.base), base))
        return all(limit is None or needed <= limit for limit, needed in limits)

    def can_read(self, prompt_token_ids: TokenIds, output_token_ids: TokenIds, adapter_prefix: TokenIds) -> bool:
        """Whether `forward` takes a row: not empty, not too long, and without token ids beyond the tokenizer.

        A base with a padded vocabulary can sample such ids; the adapter would take them for control tokens.
        """
        return (
            bool(prompt_token_ids and output_token_ids)
            and self.fits(len(adapter_prefix), len(prompt_token_ids), len(output_token_ids))
            and max(*prompt_token_ids, *output_token_ids) < self.num_known
        )

    def with_adapter(self, adapter: Any) -> Self:
        """The same policy with another adapter in place of its own."""
        other = copy.copy(self)
        other.adapter = adapter
        return other

    def steer(self, base_logits: Tensor, adapter_logits: Tensor) -> Tensor:
        """The serving formula with this policy's alpha; `[..., V]`, `[..., A]` -> `[..., V]` in float32."""
        base_logits = base_logits.float()
        logprobs = mixing.adapter_logprobs(adapter_logits, vocab_size=base_logits.shape[-1], num_known=self.num_known)
        return mixing.steer(base_logits, [(self.alpha, logprobs)])

    def forward(
        self,
        prompt_token_ids: Sequence[TokenIds],
        output_token_ids: Sequence[TokenIds],
        adapter_prefix_token_ids: Sequence[TokenIds],
    ) -> PolicyOutput:
        """Both distributions at each output token of B rows.

        Args:
            prompt_token_ids: B prompts of at least one token: without one the base has no first distribution.
            output_token_ids: B outputs of at least one token.
            adapter_prefix_token_ids: B prefixes that only the adapter sees, before the prompt; may be empty.
        """
        if not all(map(len, prompt_token_ids)) or not all(map(len, output_token_ids)):
            raise ValueError("every row needs at least one prompt token and one output token")
        outputs, mask = padded(output_token_ids, left=False, device=self.device)
        prefixed = [(*p, *q) for p, q in zip(adapter_prefix_token_ids, prompt_token_ids, strict=True)]
        with torch.no_grad():
            base_logits = self._base_reader(self.base, prompt_token_ids, output_token_ids).float()
        with self._autocast():
            adapter_logits = self._reader(self.adapter, prefixed, output_token_ids)
        return PolicyOutput(
            steered_logits=self.steer(base_logits, adapter_logits),
            base_logits=base_logits,
            output_token_ids=outputs,
            mask=mask,
        )

    def _autocast(self) -> torch.autocast:
        is_lower = self._compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self._compute_dtype if is_lower else None, enabled=is_lower)


class BuildPolicy(Protocol):
    """Puts base and adapter together: `TailoredPolicy`, or another policy that trains the same way."""

    def __call__(
        self,
        base: Any,
        adapter: Any,
        *,
        alpha: float,
        num_known: int,
        reader: LogitsReader | None = None,
        base_reader: LogitsReader | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> TailoredPolicy:
        """See `TailoredPolicy`."""
        ...


@contextlib.contextmanager
def evaluating(model: Any) -> Any:
    """Switch a model to evaluation mode and gradients off; put its mode back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
