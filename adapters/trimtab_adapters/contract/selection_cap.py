"""How far best-of-N by one reward may be taken before another, trusted more, falls: a measured curve and its cap."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Verdict = Literal["cap", "no significant bend", "beyond the data", "no significant fall"]
"""Whether the data support a cap. For `cap` the law bends down, peaks at an n that was measured, and the gold reward
measured at the largest n is significantly below that at the peak; otherwise the first of these that does not hold."""


class SelectionCurvePoint(BaseModel):
    """Best-of-n by the proxy for one n, as a mean over prompts; intervals are 95 %, over prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int
    kl: float
    """log n - (n-1)/n, in nats: the KL of best-of-n without ties, an upper bound with them."""
    gold: float
    """Gold reward of the candidate that the proxy chooses."""
    gold_low: float
    gold_high: float
    gain: float
    """How much more that is than for n = 1."""
    gain_standard_error: float


class SelectionCap(BaseModel):
    """A curve of gold against proxy reward over n, the law fitted to it, and the cap for N that follows.

    The law is gain = d (alpha - beta d) with d = sqrt(KL) (Gao et al., arXiv 2210.10760). It holds for the two versions
    and the base model named, and for prompts like those it was measured on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    proxy: str
    """Reward that chooses, `name@version`."""
    gold: str
    """Reward that is trusted more, `name@version`."""
    base_model: str
    num_prompts: int
    num_samples: int
    num_rollouts: int
    """Rollouts read."""
    left_out: dict[str, int]
    """How many of them are no samples of the curve, by reason."""
    curve: list[SelectionCurvePoint]
    """n = 1, 2, .. in order."""
    alpha: float
    alpha_standard_error: float
    beta: float
    beta_standard_error: float
    verdict: Verdict
    cap: int | None
    """N of the largest gain by the law; set exactly when the verdict is `cap`."""
    route: str | None = None
    """The only route that it was measured on; None means all."""
    created_at: float
    """Unix time in seconds."""
