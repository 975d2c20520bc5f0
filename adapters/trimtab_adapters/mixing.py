"""The formula: base logits and adapter log-probabilities to steered logits.

For the tokens sampled so far, with base logits b and adapter LMs a_i of weight alpha_i (negative allowed),

    steered = b + sum_i alpha_i * log_softmax(a_i)

so that softmax(steered) is the tailored policy, a product of experts (IPA, arXiv 2305.15065, section 2; with +1 and
-1 it is DExperts and proxy-tuning). This is the only place where it is written: the engine, the black-box path and
training call it. All functions are pure and differentiable; letters: V = width of the base logits, A = width of the
adapter's logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_PART = 256
"""Values of a row that `argmax` takes at a time."""


def adapter_logprobs(adapter_logits: Tensor, *, vocab_size: int, num_known: int) -> Tensor:
    """Log-probabilities of an adapter LM over the base model's vocabulary.

    Args:
        adapter_logits: `[..., A]`, any floating type.
        vocab_size: V.
        num_known: Number of leading token ids that mean the same in both models, at most min(A, V). What lies behind
            them in the adapter (padding rows, control tokens) is left out of the normalisation.

    Returns:
        `[..., V]` in float32. Ids from `num_known` on get the row's smallest log-probability: the adapter knows
        nothing of them, and 0 would make them likelier than everything that it knows.
    """
    if not 0 < num_known <= min(adapter_logits.shape[-1], vocab_size):
        raise ValueError(f"num_known={num_known} outside 1..min({adapter_logits.shape[-1]}, {vocab_size})")
    known = torch.log_softmax(adapter_logits[..., :num_known], dim=-1, dtype=torch.float32)
    if num_known == vocab_size:
        return known
    floor = known.amin(dim=-1, keepdim=True)
    return torch.cat((known, floor.expand(*floor.shape[:-1], vocab_size - num_known)), dim=-1)


def steering_term(terms: Sequence[tuple[float | Tensor, Tensor]]) -> Tensor:
    """What steering adds to the base logits: sum_i alpha_i * logprobs_i, in the order given.

    Args:
        terms: At least one (alpha, log-probabilities `[..., V]`); alpha is a number or a tensor that broadcasts.

    Returns:
        `[..., V]`.
    """
    if not terms:
        raise ValueError("a steering without terms adds nothing; leave the base logits alone")
    (alpha, logprobs), *rest = terms
    # 1 times a number is that number: the usual weight costs no pass over the vocabulary.
    total = logprobs if isinstance(alpha, float) and alpha == 1.0 else alpha * logprobs
    for alpha, logprobs in rest:
        total = total + alpha * logprobs
    return total


def steer(base_logits: Tensor, terms: Sequence[tuple[float | Tensor, Tensor]]) -> Tensor:
    """Steered logits, `[..., V]`. Minus infinity in the base (grammar masks, allowed ids) stays minus infinity.

    With no terms, or only zero alphas given as numbers, the base logits are returned as they are, bit for bit.
    """
    active = [(alpha, logprobs) for alpha, logprobs in terms if isinstance(alpha, Tensor) or alpha != 0.0]
    return base_logits + steering_term(active) if active else base_logits


def kl_to_base(steered_logits: Tensor, base_logits: Tensor) -> Tensor:
    """KL(steered || base) of two rows of logits over the same support, in nats, `[..., V]` -> `[...]`.

    Tokens that are minus infinity in both contribute nothing.
    """
    steered, base = torch.log_softmax(steered_logits, dim=-1), torch.log_softmax(base_logits, dim=-1)
    difference = torch.where(torch.isneginf(steered), 0.0, steered - base)
    return (steered.exp() * difference).sum(dim=-1)


def argmax(values: Tensor) -> Tensor:
    """First index of the largest value in each row, `[R, V]` -> `[R]`, as `Tensor.argmax` finds it.

    PyTorch's maximum is a vectorised loop on CPU and its argmax is not: finding the largest part of a row first and
    searching that alone is several times faster.
    """
    num_rows, width = values.shape
    if width % _PART or width == _PART:
        return values.argmax(dim=-1)
    parts = values.view(num_rows, -1, _PART)
    best = parts.amax(dim=-1).argmax(dim=-1)
    return best * _PART + parts[torch.arange(num_rows, device=values.device), best].argmax(dim=-1)
