"""Quark's loss on the tailored policy: likelihood under quantile control, a KL penalty and an entropy bonus.

Quark: arXiv 2205.13636; on the tailored policy: IPA, arXiv 2305.15065. Pure functions of tensors. Letters: B = rows,
T = output positions, V = vocabulary of the base model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuarkInputs:
    """What one batch's loss is a function of.

    Attributes:
        steered_logits: `[B, T, V]`, of the tailored policy at each output position, from `mixing.steer`; carries the
            adapter's gradient. Minus infinity where the base's is.
        base_logits: `[B, T, V]`, of the frozen base at the same positions, without gradient.
        output_token_ids: `[B, T]`, the tokens to make likelier; any valid id where `mask` is False.
        mask: `[B, T]`, True at real output tokens; at least one is.
    """

    steered_logits: Tensor
    base_logits: Tensor
    output_token_ids: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class QuarkLoss:
    """Scalars, means over all True positions of the batch; only `loss` carries a gradient.

    Attributes:
        loss: `nll + kl_coef * kl - entropy_coef * entropy`.
        nll: Negative log-likelihood of the outputs under the tailored policy, nats per token.
        kl: KL(tailored || base), nats per token.
        entropy: Entropy of the tailored policy, nats per token.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor
    entropy: Tensor


def quark_loss(inputs: QuarkInputs, *, kl_coef: float, entropy_coef: float) -> QuarkLoss:
    """Quark's loss of one batch.

    The gradient reaches the adapter through the combined softmax: for the likelihood term and an adapter logit z_k it
    is alpha * (pi(k) - 1[k = y]), whether or not the adapter's logits are normalised first, because normalising
    subtracts the same number from every token's steered logit.
    """
    steered_logits = inputs.steered_logits[inputs.mask]
    base_logits = inputs.base_logits[inputs.mask]
    targets = inputs.output_token_ids[inputs.mask]
    if not targets.numel():
        raise ValueError("a batch without output tokens has no loss")
    steered = torch.log_softmax(steered_logits.float(), dim=-1)
    base = torch.log_softmax(base_logits.float(), dim=-1)
    nll = -steered.gather(-1, targets[:, None]).mean()

    probabilities = steered.exp()
    # A token that the base forbids has probability 0 in both; 0 * (-inf) must count as 0, in value and in gradient.
    impossible = torch.isneginf(steered)
    entropy = -(probabilities * steered.masked_fill(impossible, 0.0)).sum(dim=-1).mean()
    cross_entropy = -(probabilities * base.masked_fill(impossible, 0.0)).sum(dim=-1).mean()
    kl = cross_entropy - entropy
    loss = nll + kl_coef * kl - entropy_coef * entropy
    return QuarkLoss(loss=loss, nll=nll.detach(), kl=kl.detach(), entropy=entropy.detach())
