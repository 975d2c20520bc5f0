"""Limits that every kind of reward has, and how a registered reward's options become its kind's."""

import hashlib
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.rewards import RewardSpec

Options = TypeVar("Options", bound="RewardLimits")


class RewardLimits(BaseModel):
    """Time, retries and sizes; each kind's options begin with these.

    None of them changes a score, so none is part of a version.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    timeout_s: float = Field(default=300.0, gt=0, le=3600)
    """How long one attempt at one batch may take. Python code cannot be stopped: what runs over holds its thread, and
    later batches wait for it within their own time."""
    deadline_s: float = Field(default=300.0, gt=0, le=3600)
    """How long one call may take in all, with waiting in the queue and between attempts."""
    max_retries: int = Field(default=2, ge=0, le=10)
    """Further attempts at a batch, after what may pass: no connection, too many requests, no answer in time."""
    max_batch_size: int = Field(default=64, ge=1, le=4096)
    """Most outputs of one batch. Larger calls are split, except for kinds that run in a thread."""
    max_concurrency: int = Field(default=8, ge=1, le=1024)
    """Most batches at a time. Kinds that run in a thread have one."""
    breaker_threshold: int = Field(default=5, ge=1, le=1000)
    """Attempts in a row that fail for want of an answer, after which none is made for a while."""
    breaker_cooldown_s: float = Field(default=30.0, gt=0, le=3600)
    """That while."""
    cache_size: int = Field(default=8192, ge=0, le=1_000_000)
    """How many scores are kept; 0 keeps none."""
    cache_ttl_s: float = Field(default=300.0, gt=0, le=86_400)
    """How long a score is kept."""


LIMIT_NAMES = frozenset(RewardLimits.model_fields)
"""Options that no version covers."""


def parse_options(options: type[Options], spec: RewardSpec, *, has_target: bool) -> Options:
    """The options of a kind, from what was registered.

    Args:
        options: The kind's own.
        spec: What was registered.
        has_target: Whether the kind has a target.

    Raises:
        InvalidRequestError: One of them does not fit; the message and `param` name it as `options.<name>`.
    """
    if has_target and not spec.target.strip():
        raise InvalidRequestError(f"a reward of kind {spec.kind!r} needs a target", param="target")
    if not has_target and spec.target:
        raise InvalidRequestError(f"a reward of kind {spec.kind!r} has no target; leave it out", param="target")
    try:
        return options.model_validate(spec.options, strict=True)
    except ValidationError as exc:
        raise option_error(exc, options) from exc


def parse_limits(options: type[RewardLimits], spec: RewardSpec) -> RewardLimits:
    """The limits among the options, with the defaults of the kind. Raises `InvalidRequestError`."""
    limits = {name: options.model_fields[name].default for name in LIMIT_NAMES}
    limits |= {name: value for name, value in spec.options.items() if name in LIMIT_NAMES}
    try:
        return RewardLimits.model_validate(limits, strict=True)
    except ValidationError as exc:
        raise option_error(exc, RewardLimits) from exc


def option_error(exc: ValidationError, options: type[RewardLimits]) -> InvalidRequestError:
    """What is wrong with an option, under its name in the request."""
    first = exc.errors(include_url=False)[0]
    # A validator of the whole model names no field; what follows a field's own name are members of unions, or keys.
    param = ".".join(("options", *(str(part) for part in first["loc"][:1])))
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(field.alias or name for name, field in options.model_fields.items()))
        return InvalidRequestError(f"'{param}' does not exist; known options: {known}", param=param)
    message = first["msg"].removeprefix("Value error, ")
    return InvalidRequestError(f"Invalid '{param}': {message}", param=param)


def options_hash(options: RewardLimits, *more: str) -> str:
    """A hash of all options that can change a score, and of what else can."""
    text = options.model_dump_json(exclude=set(LIMIT_NAMES))
    return hashlib.sha256("\0".join((text, *more)).encode(errors="surrogatepass")).hexdigest()[:16]
