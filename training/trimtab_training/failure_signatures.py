"""The failures of training that have names, and the figures from which on each is called by it."""

from typing import Literal

Signature = Literal["collapsed_adapter", "no_improvement", "degraded_fluency", "over_optimisation"]

COLLAPSED_DISTINCT_2_RATIO = 0.5
"""Distinct-2 of steered outputs over that of base outputs below which variety is gone."""
COLLAPSED_ENTROPY = 0.1
"""Entropy of the next token in nats below which the policy hardly chooses any more: the likeliest has about 98 %."""
COLLAPSED_REPEAT_RATE = 0.5
"""Probability that two outputs for a prompt are the same from which on it answers by heart."""
COLLAPSED_AGAINST_BASE = 0.5
"""Entropy must be below this share of the base's, and the base's repeats at most this share of the policy's: a base
that is certain itself, or repeats itself, is not the adapter's fault."""
DEGRADED_PERPLEXITY_RATIO = 1.5
"""Perplexity under the base, steered outputs over base outputs, above which fluency has suffered."""
