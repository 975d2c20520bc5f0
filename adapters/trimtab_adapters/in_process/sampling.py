"""From what an API shows of a distribution to a row of base logits, and from steered logits to a token.

All functions are pure. V is the number of tokens of the tokenizer.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trimtab_adapters.contract.sampling import GREEDY_BELOW, SamplingRules, TopLogprobs, UnseenTokens


def base_row(top: TopLogprobs, vocab_size: int, unseen: UnseenTokens) -> Tensor:
    """Base logits `[V]` in float32 from the tokens that the API showed.

    With `exclude` everything else is minus infinity. With `residual` each of the V - k others gets
    log((1 - sum p) / (V - k)), so that the row is a whole distribution; where rounding leaves nothing, minus infinity.
    """
    num_seen = len(top.token_ids)
    fill = -math.inf
    if unseen == "residual" and num_seen < vocab_size:
        rest = 1.0 - math.fsum(math.exp(logprob) for logprob in top.logprobs)
        fill = math.log(rest / (vocab_size - num_seen)) if rest > 0.0 else -math.inf
    row = torch.full((vocab_size,), fill)
    row[torch.tensor(top.token_ids, dtype=torch.long)] = torch.tensor(top.logprobs, dtype=torch.float32)
    return row


def constrained(row: Tensor, rules: SamplingRules, num_sampled: int) -> Tensor:
    """Base logits `[V]` under the constraints that act before steering, changed in place.

    Args:
        row: `[V]`.
        rules: The request's.
        num_sampled: Tokens that the answer has already.
    """
    for token_id, bias in rules.logit_bias.items():
        row[token_id] += bias
    if rules.allowed_token_ids is not None:
        allowed = torch.zeros_like(row, dtype=torch.bool)
        allowed[torch.tensor(sorted(rules.allowed_token_ids), dtype=torch.long)] = True
        row.masked_fill_(~allowed, -torch.inf)
    if num_sampled < rules.min_tokens and rules.ending_ids:
        row[torch.tensor(sorted(rules.ending_ids), dtype=torch.long)] = -torch.inf
    return row


def sample(logits: Tensor, rules: SamplingRules, counts: Mapping[int, int], uniform: float) -> int:
    """One token from steered logits.

    Args:
        logits: `[V]` with at least one finite value.
        rules: The request's.
        counts: How often each token was sampled in this answer.
        uniform: A random number in [0, 1); not used when greedy.
    """
    token_ids = torch.isfinite(logits).nonzero()[:, 0]
    values = _penalised(logits, rules, counts)[token_ids].double()
    if rules.temperature < GREEDY_BELOW:
        return int(token_ids[values.argmax()])
    probabilities, order = torch.softmax(values / rules.temperature, dim=-1).sort(descending=True, stable=True)
    kept = probabilities >= rules.min_p * probabilities[0]
    if rules.top_k > 0:
        kept[rules.top_k :] = False
    probabilities = torch.where(kept, probabilities, 0.0)
    probabilities = probabilities / probabilities.sum()
    if rules.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = torch.where(before < rules.top_p, probabilities, 0.0)
    total = probabilities.cumsum(dim=-1)
    # The last token with a probability ends the search where rounding would go beyond it.
    place = min(int(torch.searchsorted(total, uniform * total[-1], right=True)), int((probabilities > 0).sum()) - 1)
    return int(token_ids[order[place]])


def _penalised(logits: Tensor, rules: SamplingRules, counts: Mapping[int, int]) -> Tensor:
    if not counts or not (rules.frequency_penalty or rules.presence_penalty):
        return logits
    token_ids = torch.tensor(list(counts), dtype=torch.long)
    numbers = torch.tensor(list(counts.values()), dtype=logits.dtype)
    penalties = rules.frequency_penalty * numbers + rules.presence_penalty
    return logits.index_add(0, token_ids, -penalties)
