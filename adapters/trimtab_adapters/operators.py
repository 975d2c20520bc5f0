"""Operators on what a steering adds to the base logits: guidance, the plausibility mask, the cap on KL.

All functions are pure. Letters: R rows, V width of the base logits b, d the sum that a steering adds. What is minus
infinity in b is so in every result.
"""

import torch
from torch import Tensor

_KL_TOLERANCE = 1e-3
"""A capped row moves at least this close to its cap, relatively, and never beyond it."""

_MAX_ITERATIONS = 40
"""Of the search for the scale of a row: Newton takes 3 to 6, bisection alone could need all."""


def guidance_term(base_logits: Tensor, negative_logprobs: Tensor, strength: Tensor) -> Tensor:
    """What classifier-free guidance adds: strength * (log_softmax(b) - n), arXiv 2306.17806, equation 7.

    Args:
        base_logits: `[R, V]`.
        negative_logprobs: `[R, V]` n, the base's own under the negative prompt.
        strength: `[R, 1]`, the guidance scale minus 1; 0 leaves a row as it is.

    Returns:
        `[R, V]`, 0 where the base is minus infinity.
    """
    difference = torch.log_softmax(base_logits, dim=-1) - negative_logprobs
    return strength * difference.masked_fill_(torch.isneginf(base_logits), 0.0)


def implausible(base_logits: Tensor, fraction: Tensor) -> Tensor:
    """Which tokens the plausibility mask takes out: base probability below `fraction` of the row's largest.

    The adaptive plausibility constraint of contrastive decoding, arXiv 2210.15097, section 3.3.

    Args:
        base_logits: `[R, V]`.
        fraction: `[R, 1]` in [0, 1]; 0 takes nothing out, 1 leaves the base's most probable tokens alone.

    Returns:
        `[R, V]`, True for the tokens to exclude.
    """
    return base_logits < base_logits.amax(dim=-1, keepdim=True) + torch.log(fraction)


def capped_scale(base_logits: Tensor, added: Tensor, max_kl: Tensor) -> Tensor:
    """The largest s in [0, 1] with KL(softmax(b + s d) || softmax(b)) <= cap, for each row.

    The path s -> b + s d is that of decoding-time realignment (arXiv 2402.02992). KL grows along it, because its
    derivative is s Var_s(d), so the largest s is found by Newton's method kept inside a shrinking bracket.

    Args:
        base_logits: `[R, V]`; minus infinity allowed.
        added: `[R, V]` finite d.
        max_kl: `[R, 1]` caps in nats, positive; infinity for rows without one.

    Returns:
        `[R, 1]`, exactly 1 where the whole step fits.
    """
    scale = torch.ones_like(max_kl)
    kl, _ = _kl_along(base_logits, added, scale)
    over = (kl > max_kl)[:, 0].nonzero()[:, 0]
    if len(over):
        scale[over] = _search(base_logits[over], added[over], max_kl[over])
    return scale


def _search(base_logits: Tensor, added: Tensor, cap: Tensor) -> Tensor:
    """`capped_scale` of rows whose whole step is too far; all `[R, 1]`. The answer is the bracket's lower end."""
    low, high, low_kl = torch.zeros_like(cap), torch.ones_like(cap), torch.zeros_like(cap)
    # Near 0, KL = s^2 Var_0(d) / 2.
    _, variance = _kl_along(base_logits, added, low)
    guess = torch.sqrt(2 * cap / variance.clamp(min=1e-30)).clamp(max=0.5)
    for number in range(1, _MAX_ITERATIONS + 1):
        kl, variance = _kl_along(base_logits, added, guess)
        fits = kl <= cap
        low, low_kl = torch.where(fits, guess, low), torch.where(fits, kl, low_kl)
        high = torch.where(fits, high, guess)
        if bool(((low_kl >= cap * (1 - _KL_TOLERANCE)) | (high - low < 1e-6)).all()):
            break
        # Aim a little below the cap, so that the next guess fits; halve the bracket now and then, because KL may be
        # neither convex nor concave and Newton's steps alone may creep.
        newton = guess + (cap * (1 - _KL_TOLERANCE / 2) - kl) / (guess * variance).clamp(min=1e-30)
        is_useful = (newton > low) & (newton < high) & (number % 4 != 0)
        guess = torch.where(is_useful, newton, (low + high) / 2)
    return low


def _kl_along(base_logits: Tensor, added: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(b + s d) || softmax(b)) and Var_s(d), each `[R, 1]`."""
    logits = base_logits + scale * added
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    probabilities = torch.exp(logits - normaliser)
    mean = (probabilities * added).sum(dim=-1, keepdim=True)
    variance = (probabilities * (added - mean).square()).sum(dim=-1, keepdim=True)
    kl = scale * mean - normaliser + torch.logsumexp(base_logits, dim=-1, keepdim=True)
    return kl.clamp(min=0.0), variance
