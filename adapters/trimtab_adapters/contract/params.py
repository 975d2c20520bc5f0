"""Steering as a caller asks for it and as the engine receives it.

A *steering* is a list of (adapter, alpha). The API form names adapters (`SteeringRequest`); the gateway resolves it
to exact versions (`SteeringParams`), which travel to the engine in vLLM's `vllm_xargs` under one key as JSON text,
because `vllm_xargs` allows no nested objects.
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


class SteeringRequest(BaseModel):
    """The `steering` field of a request body."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: list[AdapterChoice] = Field(max_length=MAX_ADAPTERS)


class AdapterWeight(BaseModel):
    """One resolved term of a steering: an exact version and its weight. `name` is for reports only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: AdapterName
    version: VersionId
    alpha: Alpha


class SteeringParams(BaseModel):
    """What the engine needs to steer one candidate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uid: str = Field(min_length=1, max_length=128)
    """Unique per candidate: the gateway fans `n` and `best_of` out, one uid each."""
    adapters: list[AdapterWeight] = Field(max_length=MAX_ADAPTERS)
    record: bool = False
    """Keep base, adapter and steered log-probabilities of each sampled token until they are taken."""

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

    def to_xargs(self) -> dict[str, str]:
        """The `vllm_xargs` object for this steering."""
        return {XARGS_KEY: self.model_dump_json()}

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
