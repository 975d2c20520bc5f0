"""Steering as a caller asks for it and as the engine receives it.

A *steering* is a list of (adapter, alpha), and operators on what they add. The API form names adapters
(`SteeringRequest`); the gateway resolves it to exact versions (`SteeringParams`), which travel to the engine in vLLM's
`vllm_xargs` under one key as JSON text, because `vllm_xargs` allows no nested objects.
"""

import json
import math
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trimtab_adapters.contract.errors import InvalidRequestError

XARGS_KEY = "trimtab"
"""The key in `vllm_xargs` (and so in `SamplingParams.extra_args`) that carries `SteeringParams` as JSON text."""

MAX_ALPHA = 100.0
"""Largest absolute weight of an adapter. Far above any use in the literature (DExperts: 3.2), far below overflow."""

MAX_ADAPTERS = 8
"""Most adapters in one steering: each costs a forward pass per step."""

FAILED_LOGPROB = -9999.0
"""vLLM clamps returned log-probabilities here. The engine reports exactly this at the sampled token of a row whose
steering failed, so that the gateway sees the failure in the same chunk as the token and never passes the token on."""

Alpha = Annotated[float, Field(ge=-MAX_ALPHA, le=MAX_ALPHA, allow_inf_nan=False)]
VersionId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""Identity of an adapter version: the first 16 hex digits of the SHA-256 of its manifest."""
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class AdapterChoice(BaseModel):
    """One adapter in a steering as the caller writes it; `version` None means the adapter's newest version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: AdapterName
    version: VersionId | None = None
    alpha: Alpha | None = None
    """Weight of the adapter's log-probabilities; None means the version's default alpha."""


class AlphaSchedule(BaseModel):
    """When adapters act: at the generated tokens `start` to `start + first - 1`, counted from 0, and ever weaker.

    Steering the first tokens only is SafeDecoding's way (arXiv 2402.08983, section 4), because early tokens decide
    whether an answer complies or refuses (arXiv 2406.05946). Outside its tokens the base is left bit for bit, and the
    adapter LMs do not run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: int = Field(default=0, ge=0)
    first: int | None = Field(default=None, ge=1)
    """How many tokens from `start` on; None means to the end."""
    decay: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    """Factor on alpha from each steered token to the next."""

    def factor(self, position: int) -> float:
        """What multiplies every alpha at the generated token of this number, counted from 0; 0 where none acts."""
        past = position - self.start
        if past < 0 or (self.first is not None and past >= self.first):
            return 0.0
        return float(self.decay**past)


class SteeringOperators(BaseModel):
    """What is done with the sum that the terms of a steering add to the base logits, in the order of the fields.

    With no term to act on, or outside the schedule, they do nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schedule: AlphaSchedule | None = None
    plausibility: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Only tokens whose base probability is at least this fraction of the largest can be sampled: the adaptive
    plausibility constraint of contrastive decoding (arXiv 2210.15097, section 3.3)."""
    max_kl: float | None = Field(default=None, ge=1e-4, allow_inf_nan=False)
    """Most nats per token that steering may move the base's distribution, restricted to the plausible tokens. What the
    terms add is scaled down until KL(steered || base) fits; the path is that of decoding-time realignment
    (arXiv 2402.02992)."""


MAX_ALTERNATIVES = 20
"""Most alternatives per token in an explanation; OpenAI's limit of `top_logprobs`."""

DEFAULT_ALTERNATIVES = 5
"""Alternatives per token of `explain: true`."""

DEFAULT_GUIDANCE_SCALE = 1.5
"""The value that classifier-free guidance for language models recommends (arXiv 2306.17806)."""

GuidanceScale = Annotated[float, Field(gt=0, le=MAX_ALPHA, allow_inf_nan=False)]


class PromptMessage(BaseModel):
    """One message of a negative prompt for chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str = Field(min_length=1, max_length=64)
    content: str


class SteeringOptions(SteeringOperators):
    """What a request or a route says of a steering beside its adapters."""

    negative_prompt: str | list[int] | list[PromptMessage] | None = Field(default=None, min_length=1)
    """Steer away from how the base itself would go on after this prompt, instead of the request's, and the same
    output. Text or token ids for completions, messages for chat."""
    guidance_scale: GuidanceScale | None = None
    """How far, see `Guidance`; `DEFAULT_GUIDANCE_SCALE` when there is a negative prompt."""

    @property
    def operators(self) -> SteeringOperators:
        """The operators alone."""
        return SteeringOperators(schedule=self.schedule, plausibility=self.plausibility, max_kl=self.max_kl)

    @property
    def scale(self) -> float | None:
        """The guidance scale that holds; None without a negative prompt."""
        if self.negative_prompt is None:
            return None
        return DEFAULT_GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale

    def overridden_by(self, other: "SteeringOptions | None") -> "SteeringOptions":
        """These options with those fields replaced that `other` was given, also where it was given None.

        Raises:
            InvalidRequestError: A guidance scale is left without a negative prompt.
        """
        if other is None:
            return self
        given = other.model_fields_set & SteeringOptions.model_fields.keys()
        values = {name: getattr(other if name in given else self, name) for name in SteeringOptions.model_fields}
        if values["negative_prompt"] is None and values["guidance_scale"] is not None:
            if other.guidance_scale is not None:
                raise InvalidRequestError(
                    "'steering.guidance_scale' needs 'steering.negative_prompt' to steer away from.",
                    param="steering.guidance_scale",
                )
            values["guidance_scale"] = None  # it was for the prompt that `other` took away
        return SteeringOptions.model_construct(**values)


class SteeringRequest(SteeringOptions):
    """The `steering` field of a request body."""

    adapters: list[AdapterChoice] | None = Field(default=None, max_length=MAX_ADAPTERS)
    """None keeps those of the route that `model` names; an empty list takes none."""
    explain: bool | Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] = False
    """Say per token what each model thought of it: True, or the number of alternatives to list."""

    @property
    def num_alternatives(self) -> int | None:
        """Alternatives per token of the explanation; None when none is asked for."""
        if isinstance(self.explain, bool):
            return DEFAULT_ALTERNATIVES if self.explain else None
        return self.explain


class AdapterWeight(BaseModel):
    """One resolved term of a steering: an exact version and its weight. `name` is for reports only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: AdapterName
    version: VersionId
    alpha: Alpha


class Guidance(BaseModel):
    """The base as an expert under another prompt: classifier-free guidance with a negative prompt.

    Adds (scale - 1) (log softmax(b) - log softmax(n)) to the base logits b, where n are the base's own logits after
    the negative prompt and the same output. So the tailored policy is b^scale n^(1 - scale), renormalised
    (arXiv 2306.17806, equation 7; `guidance_scale` and `negative_prompt_ids` of transformers).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_ids: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    scale: GuidanceScale


class SteeringParams(BaseModel):
    """What the engine needs to steer one candidate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uid: str = Field(min_length=1, max_length=128)
    """Unique per candidate: the gateway fans `n` and `best_of` out, one uid each."""
    adapters: list[AdapterWeight] = Field(max_length=MAX_ADAPTERS)
    guidance: Guidance | None = None
    operators: SteeringOperators = SteeringOperators()
    record: bool = False
    """Keep base, adapter and steered log-probabilities of each sampled token until they are taken."""
    num_alternatives: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    """Keep also so many of the most probable tokens before and after steering; None keeps none. Needs `record`."""

    @field_validator("adapters")
    @classmethod
    def _distinct(cls, adapters: list[AdapterWeight]) -> list[AdapterWeight]:
        if len({a.version for a in adapters}) != len(adapters):
            raise ValueError("the same adapter version appears twice; add the alphas instead")
        return adapters

    @property
    def active(self) -> list[AdapterWeight]:
        """The terms with a non-zero weight; with none the base is left untouched, bit for bit."""
        return [a for a in self.adapters if a.alpha != 0.0]

    @property
    def is_active(self) -> bool:
        """Whether anything moves the base."""
        return bool(self.active) or (self.guidance is not None and self.guidance.scale != 1.0)

    @property
    def needs_row(self) -> bool:
        """Whether the engine must look at this candidate: to steer it, or to explain that nothing did."""
        return self.is_active or self.num_alternatives is not None

    def to_xargs(self) -> dict[str, str]:
        """The `vllm_xargs` object for this steering."""
        return {XARGS_KEY: self.model_dump_json(exclude_defaults=True)}

    @classmethod
    def from_extra_args(cls, extra_args: dict[str, Any] | None) -> Self | None:
        """Parse what `to_xargs` wrote; None when the request carries no steering.

        Raises:
            InvalidRequestError: The key is present but its value is not a valid steering.
        """
        if not extra_args or XARGS_KEY not in extra_args:
            return None
        raw = extra_args[XARGS_KEY]
        if not isinstance(raw, str):
            raise InvalidRequestError(f"vllm_xargs.{XARGS_KEY} must be JSON text", param=f"vllm_xargs.{XARGS_KEY}")
        try:
            return cls.model_validate(json.loads(raw, parse_constant=_refuse_constant))
        except (ValidationError, ValueError) as exc:
            raise InvalidRequestError(
                f"vllm_xargs.{XARGS_KEY} is not a valid steering: {exc}", param=f"vllm_xargs.{XARGS_KEY}"
            ) from exc


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that a steering may carry")


def is_failed_logprob(logprob: float | None) -> bool:
    """Whether a log-probability in the engine's answer is the mark of a row whose steering failed."""
    return logprob is not None and (math.isnan(logprob) or logprob <= FAILED_LOGPROB)
