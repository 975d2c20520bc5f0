"""The fields that completions and chat completions share: OpenAI's, vLLM's and ours.

Types are strict: `"n": "1"` is an error, not 1. `null` means the default, as OpenAI's clients send it. Bounds are
OpenAI's; what only the engine can judge (vocabulary, context length, grammar) it judges, and its 400 is passed on.
"""

import re
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.params import XARGS_KEY, SteeringRequest
from trimtab_adapters.contract.selection import SelectionStrategy
from trimtab_server.api.calibration_field import CalibrationField
from trimtab_server.api.selection_field import parse_selection
from trimtab_server.api.steering_field import parse_steering
from trimtab_server.api.validation import type_name
from trimtab_server.decoding.job import PromptInput
from trimtab_server.middleware import is_request_id

MAX_CHOICES = 128
MAX_BEST_OF = 20
MAX_LOGPROBS = 20
MAX_STOPS = 4

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]

_REFUSED = {
    "prompt_embeds": "embeddings cannot be steered or logged as tokens; send text or token ids",
    "kv_transfer_params": "how engines pass their caches to each other is not a caller's choice",
    "ec_transfer_params": "how engines pass their caches to each other is not a caller's choice",
    "mm_payload": "it only acts on vLLM's render routes, which this server does not have",
    "return_mm_kwargs": "it only acts on vLLM's render routes, which this server does not have",
}
"""Fields of vLLM that make no sense here or are unsafe to let through, and why."""

_OURS = {
    *("model", "prompt", "messages", "n", "best_of", "seed", "stream", "stream_options", "user", "request_id", "echo"),
    *(
        "steering",
        "steering_logprobs",
        "reward",
        "calibration",
        "selection",
        "logprobs",
        "top_logprobs",
        "return_token_ids",
    ),
    *("use_beam_search", "length_penalty", "return_token_offsets", "stream_interval", "metadata", "store"),
    *("service_tier", "prompt_cache_key", "safety_identifier", "include_reasoning", "modalities"),
}
"""Fields that the gateway acts on itself or puts into the engine's body in its own way."""


def _stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequestError(
            f"Invalid type for 'stop': expected a string or an array of strings, but got {type_name(value)} instead.",
            param="stop",
            code="invalid_type",
        )
    if any(not stop for stop in stops):
        raise InvalidRequestError("Invalid 'stop': a stop sequence must not be empty.", param="stop")
    return stops


def _logit_bias(value: Any) -> Any:
    if isinstance(value, dict):
        for key, bias in value.items():
            if not re.fullmatch(r"[0-9]{1,10}", key):
                raise InvalidRequestError(
                    f"Invalid key in 'logit_bias': {key}. You should only be submitting token ids.", param="logit_bias"
                )
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise InvalidRequestError(
                    "Invalid value in 'logit_bias': biases must be numbers between -100 and 100.", param="logit_bias"
                )
    return value


def _xargs(value: Any) -> Any:
    if isinstance(value, dict):
        if XARGS_KEY in value:
            raise InvalidRequestError(
                f"'vllm_xargs.{XARGS_KEY}' is this server's own; ask for steering with the field 'steering'.",
                param=f"vllm_xargs.{XARGS_KEY}",
            )
        for key, item in value.items():
            items = item if isinstance(item, list) else [item]
            if any(isinstance(part, bool) or not isinstance(part, str | int | float) for part in items):
                raise InvalidRequestError(
                    f"Invalid 'vllm_xargs.{key}': values are strings, numbers, or arrays of these.",
                    param=f"vllm_xargs.{key}",
                )
    return value


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(BaseModel):
    """A request body; see the subclasses."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    choices_field: ClassVar[str] = "n"

    model: str
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, float], BeforeValidator(_logit_bias)] | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(default=None, ge=1, le=MAX_BEST_OF)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: Int64 | None = None
    stop: Annotated[list[str], BeforeValidator(_stop), Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    user: str | None = None
    response_format: dict[str, Any] | None = None

    # vLLM's sampling extras
    use_beam_search: bool = False
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    watermarking: bool | None = None
    length_penalty: float | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Int64 | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    allowed_token_ids: list[TokenId] | None = None
    prompt_logprobs: int | None = Field(default=None, ge=-1)
    logprob_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None

    # vLLM's other extras
    add_special_tokens: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: Int64 | None = None
    request_id: str | None = None
    session_id: str | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool = False
    routed_experts_prompt_start: int | None = Field(default=None, ge=0)
    return_token_offsets: bool | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    vllm_xargs: Annotated[dict[str, Any], BeforeValidator(_xargs)] | None = None
    repetition_detection: dict[str, Any] | None = None
    thinking_token_budget: int | None = Field(default=None, ge=-1)
    stream_interval: int | None = Field(default=None, ge=1)

    # ours
    steering: Annotated[SteeringRequest, BeforeValidator(parse_steering)] | None = None
    """What is given here, also as null, holds instead of what the route that `model` names has."""
    steering_logprobs: bool = False
    """Adds base, adapter and steered log-probabilities, KL and flips per token to each choice."""
    reward: str | None = Field(default=None, min_length=1, max_length=128)
    """Name of a registered reward; all candidates are scored and the best are returned."""
    calibration: CalibrationField | None = None
    selection: Annotated[SerializeAsAny[SelectionStrategy], BeforeValidator(parse_selection)] | None = None
    """How choices are found among the candidates; by default the best of them."""

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, why in _REFUSED.items():
            if data.get(name) is not None:
                raise InvalidRequestError(
                    f"'{name}' is not supported: {why}.", param=name, code="unsupported_parameter"
                )
        known = {*cls.model_fields, *_REFUSED}
        # An unknown field is an error even as null; a known one then has its default.
        return {name: value for name, value in data.items() if value is not None or name not in known}

    @abstractmethod
    def prompts(self) -> tuple[PromptInput, ...]:
        """The prompts of the request."""

    @abstractmethod
    def engine_fields(self) -> dict[str, Any]:
        """The engine's body without prompt and seed."""

    @property
    @abstractmethod
    def wants_logprobs(self) -> bool:
        """Whether the caller asked for log-probabilities."""

    @property
    def include_usage(self) -> bool:
        """Whether the stream shall end with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk shall say how many tokens there are so far."""
        return (
            self.include_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
        )

    def passed_on(self) -> dict[str, Any]:
        """The given fields that go to the engine as they are."""
        return self.model_dump(exclude_unset=True, exclude=_OURS, mode="json")

    def check(self) -> None:
        """Fields that do not go together. Raises `InvalidRequestError`."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
            )
        if self.use_beam_search:
            raise InvalidRequestError(
                "'use_beam_search' is not supported: candidates are sampled one by one, and steering acts on samples. "
                "Use 'best_of' to choose among several.",
                param="use_beam_search",
                code="unsupported_parameter",
            )
        if self.length_penalty not in (None, 1.0):
            raise InvalidRequestError(
                "'length_penalty' only acts with 'use_beam_search', which is not supported.", param="length_penalty"
            )
        if self.return_token_offsets:
            raise InvalidRequestError(
                "'return_token_offsets' only acts on vLLM's render routes, which this server does not have.",
                param="return_token_offsets",
                code="unsupported_parameter",
            )
        if self.stream and self.prompt_logprobs not in (None, 0):
            raise InvalidRequestError("'prompt_logprobs' are not available in a stream.", param="prompt_logprobs")
        if self.request_id is not None and not is_request_id(self.request_id):
            raise InvalidRequestError(
                "Invalid 'request_id': 1 to 128 letters, digits and any of . _ : / + = @ -", param="request_id"
            )
