"""The settings of each objective; `objective.kind` in a configuration says which one a run has.

Defaults are those of the method's authors where they published any; `docs/training.md` gives the sources.
"""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from trimtab_training.config_section import ConfigSection


class QuarkConfig(ConfigSection):
    """Quark on the tailored policy (IPA's algorithm)."""

    kind: Literal["quark"] = "quark"
    num_bins: int = Field(default=5, ge=2, le=64)
    """Number of reward quantiles, each with a control token of its own."""
    control_token_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Tokens of the adapter's vocabulary that stand for the quantiles, best first, such as reserved ones that no text
    has. Left out, rows are added to the adapter's embeddings, which a LoRA cannot do."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Weight of KL(tailored || base), exact over the vocabulary, in nats per token."""
    kl_target: float | None = Field(default=None, gt=0)
    """KL per token that the weight is steered towards, in nats; left out, the weight stays as it is."""
    entropy_coef: float = Field(default=0.06, ge=0)
    """Weight of the entropy bonus of the tailored policy, in nats per token."""
    entropy_target: float | None = Field(default=None, gt=0)
    """Entropy per token that the weight is steered towards, in nats; left out, the weight stays as it is."""
    horizon: float = Field(default=2500.0, gt=0)
    """Rollouts over which the two weights move by a factor of about e while they are off by as much as their target."""

    @model_validator(mode="after")
    def _one_token_per_quantile(self) -> Self:
        ids = self.control_token_ids
        if ids is not None and (len(ids) != self.num_bins or len(set(ids)) != len(ids)):
            raise ValueError(f"control_token_ids needs {self.num_bins} different tokens, one per quantile")
        return self


class RlooConfig(ConfigSection):
    """REINFORCE with a leave-one-out baseline; needs `fresh.num_per_prompt` of 2 or more."""

    kind: Literal["rloo"] = "rloo"
    kl_coef: float = Field(default=0.05, ge=0)
    """What a nat of KL(tailored || base) of a whole output costs in reward."""
    epochs: int = Field(default=1, ge=1, le=64)
    """How often the rollouts of a round are gone through."""
    max_ratio: float = Field(default=2.0, ge=1)
    """Largest importance weight of an output whose policy is no longer the one that is trained."""


class VbonConfig(ConfigSection):
    """The policy that best-of-n draws from, distilled: RLOO on the log of the calibrated reward (vBoN)."""

    kind: Literal["vbon"] = "vbon"
    n: int = Field(default=8, ge=2)
    """Of the best-of-n that is distilled; the weight of the KL is 1 / (n - 1)."""
    epochs: int = Field(default=1, ge=1, le=64)
    """How often the rollouts of a round are gone through."""
    max_ratio: float = Field(default=2.0, ge=1)
    """Largest importance weight of an output whose policy is no longer the one that is trained."""

    @property
    def kl_coef(self) -> float:
        """What a nat of KL(tailored || base) of a whole output costs in log calibrated reward."""
        return 1.0 / (self.n - 1)


class BonbonConfig(ConfigSection):
    """Best-of-n distilled from the best and the worst of n outputs of the base (BoNBoN)."""

    kind: Literal["bonbon"] = "bonbon"
    n: int = Field(default=8, ge=2)
    """Outputs of the base per prompt, of which the best and the worst are learned from; `fresh.num_per_prompt` must be
    the same."""
    likelihood_weight: float = Field(default=0.005, ge=0, le=1)
    """Share of the likelihood of the best in the loss; the rest is the preference of the best over the worst."""


class PpoSettings(ConfigSection):
    """What PPO and NLPO have in common."""

    kl_coef: float = Field(default=0.1, ge=0)
    """What a nat of log-ratio to the base costs in reward, at each token."""
    kl_target: float | None = Field(default=None, gt=0)
    """Mean log-ratio per token that the weight is steered towards, in nats; left out, the weight stays as it is."""
    epochs: int = Field(default=5, ge=1, le=64)
    """How often the rollouts of a round are gone through."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """How far the ratio of new to old probability of a token may go from 1 and still move the policy."""
    gamma: float = Field(default=0.99, gt=0, le=1)
    """Discount of later rewards, per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """How far advantages look ahead: 0 trusts the value model, 1 the rewards."""
    value_coef: float = Field(default=0.5, ge=0)
    """Weight of the value model's squared error."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus, in nats per token."""

    @model_validator(mode="after")
    def _can_follow(self) -> Self:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target multiplies kl_coef, which is 0 and stays so")
        return self


class PpoConfig(PpoSettings):
    """PPO with a value model of its own, an adaptive KL penalty and generalised advantages."""

    kind: Literal["ppo"] = "ppo"


class NlpoConfig(PpoSettings):
    """PPO that draws from the most probable tokens of an earlier policy only (NLPO).

    Rounds are drawn in this process, because an engine does not know the mask; the evaluation draws without it, as the
    version will be served.
    """

    kind: Literal["nlpo"] = "nlpo"
    mask_top_p: float = Field(default=0.9, gt=0, le=1)
    """Probability that the tokens which may be drawn have together under the mask's policy."""
    mask_min_tokens: int = Field(default=100, ge=1)
    """Fewest tokens that may be drawn, besides the end tokens, which always may."""
    mask_interval: int = Field(default=5, ge=1)
    """Rounds after which the mask's policy becomes the one that is trained."""


def _kind(value: object) -> str:
    """`kind`, which may be left out for Quark."""
    found = value.get("kind", "quark") if isinstance(value, dict) else getattr(value, "kind", "")
    return str(found)


ObjectiveConfig = Annotated[
    Annotated[QuarkConfig, Tag("quark")]
    | Annotated[RlooConfig, Tag("rloo")]
    | Annotated[VbonConfig, Tag("vbon")]
    | Annotated[BonbonConfig, Tag("bonbon")]
    | Annotated[PpoConfig, Tag("ppo")]
    | Annotated[NlpoConfig, Tag("nlpo")],
    Discriminator(_kind),
]
