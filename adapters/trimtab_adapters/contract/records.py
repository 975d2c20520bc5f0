"""What is known of a sampled candidate: the engine's record of its steering, and the rollout as it is stored.

Log-probabilities are always named by origin: `base`, `adapter`, `steered`. All are natural logarithms before
temperature and before top-k/top-p, at the sampled token.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trimtab_adapters.contract.feedback import Feedback
from trimtab_adapters.contract.params import AdapterWeight

ROLLOUT_SCHEMA_VERSION = 1


class Alternative(BaseModel):
    """A token that could have been sampled, with its log-probability before and after steering.

    None stands for minus infinity: a token that a constraint, or the plausibility mask, excludes.
    """

    model_config = ConfigDict(extra="forbid")

    token_id: int
    base: float | None
    steered: float | None


class Alternatives(BaseModel):
    """The most probable tokens of one position, most probable first, as the base and as the steering sees them."""

    model_config = ConfigDict(extra="forbid")

    before: list[Alternative]
    after: list[Alternative]


class SteeringRecord(BaseModel):
    """The engine's record of one steered candidate. Lists have one entry per sampled token."""

    model_config = ConfigDict(extra="forbid")

    uid: str
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    """Why steering failed; set exactly when `status` is `failed`."""
    num_tokens: int = 0
    """Tokens that were sampled with this steering in force; counted also when nothing else is recorded."""
    token_ids: list[int] = Field(default_factory=list)
    base_logprobs: list[float] = Field(default_factory=list)
    adapter_logprobs: list[list[float | None]] = Field(default_factory=list)
    """One list per adapter of the steering with a non-zero alpha, in the steering's order; None at tokens where the
    schedule kept it from running."""
    negative_logprobs: list[float | None] | None = None
    """The base's own under the negative prompt; None as a whole without one."""
    steered_logprobs: list[float] = Field(default_factory=list)
    kl: list[float] = Field(default_factory=list)
    """KL(steered || base) of the whole next-token distribution, in nats."""
    flipped: list[bool] = Field(default_factory=list)
    """Whether steering changed the most probable token."""
    alternatives: list[Alternatives] | None = None
    """Where an explanation was asked for."""


CalibrationMethod = Literal["reference", "leave_one_out", "pooled"]
"""What estimated a calibrated reward: rollouts of the same prompt, the other candidates, or a fit over prompts."""


class RewardValue(BaseModel):
    """A raw reward and, where a calibrator was at hand, its calibrated value in [0, 1]."""

    model_config = ConfigDict(extra="forbid")

    name: str
    version: str
    raw: float
    """Of a mix: its parts' ranks combined, before the combination is calibrated."""
    calibrated: float | None = None
    calibration_size: int | None = None
    """Number of reference rollouts behind `calibrated`."""
    calibration_error: float | None = None
    """Standard error of `calibrated`."""
    calibration_method: CalibrationMethod | None = None
    calibration_stale: bool = False
    """Whether the calibrator was made for something else and was used all the same, because the request allowed it."""
    parts: list["RewardValue"] | None = None
    """Of a mix: its rewards, each calibrated by itself, in the order of the mix's parts."""


X_REQUEST_ID = "x_request_id"
"""Entry of a rollout's metadata: the id that the caller gave the request."""

RolloutEndpoint = Literal["completions", "chat.completions", "reference", "training"]
"""What a rollout was generated for."""


class Rollout(BaseModel):
    """One candidate, as logged by the gateway and read by training. One row per candidate, chosen or not."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    id: str
    """Unique; writing the same id twice is a no-op."""
    request_id: str
    created_at: float
    """Unix time in seconds at which the candidate was complete."""
    duration_s: float
    route: str
    """The model name that the caller used."""
    base_model: str
    endpoint: RolloutEndpoint
    prompt: str | None = None
    """Prompt text where the caller sent text; None where token ids were sent."""
    prompt_token_ids: list[int]
    output_text: str
    output_token_ids: list[int]
    steering: list[AdapterWeight]
    base_logprobs: list[float] | None = None
    adapter_logprobs: list[list[float | None]] | None = None
    """As in `SteeringRecord`: None at tokens where a schedule kept an adapter from running."""
    steered_logprobs: list[float] | None = None
    """Of an unsteered candidate equal to `base_logprobs`."""
    kl: list[float] | None = None
    flipped: list[bool] | None = None
    sampling: dict[str, Any] = Field(default_factory=dict)
    """temperature, top_p, top_k, seed, max_tokens, stop, ... as the engine was asked; `steering_operators`
    (`SteeringOperators`) and `guidance` (`Guidance`) where these acted beside or instead of adapters; `selection` where
    the answer was put together from chosen pieces; `black_box` where tokens were sampled from the most probable ones
    that an API showed, which base and steered log-probabilities are normalised over then."""

    candidate_index: int = 0
    num_candidates: int = 1
    chosen: bool = True
    choice_index: int | None = None
    """Its index among the choices of the answer; None of what was not returned, or was logged before there was this."""
    finish_reason: str | None = None
    rewards: list[RewardValue] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)
    """For example the training job that drew it."""
    feedback: list[Feedback] = Field(default_factory=list)
    """What people said of it so far, the earliest first; known only when it is read from the log."""

    @property
    def rating(self) -> float | None:
        """Mean of its ratings; None without any."""
        ratings = [item.rating for item in self.feedback if item.rating is not None]
        return sum(ratings) / len(ratings) if ratings else None

    @property
    def is_plain(self) -> bool:
        """Whether nothing but base and adapters, weighted by their alphas at every token, made the distribution."""
        return not self.sampling.keys() & {"steering_operators", "guidance", "selection", "black_box"}

    @property
    def is_complete(self) -> bool:
        """Whether it came to an end of its own; what a strategy stopped did not, and its text is no sample."""
        return self.finish_reason != "abort"
