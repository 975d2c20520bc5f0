"""What the gateway answers, as frozen dataclasses, and what requests may carry, as typed dictionaries.

Fields that a newer gateway adds are kept in `extra`, where a type has it, and otherwise ignored, so an older client
goes on working. Log-probabilities are natural logarithms of the steered distribution before temperature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Required, TypedDict

# What requests carry.


class AdapterChoice(TypedDict, total=False):
    """One adapter of a steering. Without `version` the newest, without `alpha` the version's default."""

    name: Required[str]
    version: str | None
    alpha: float | None


class AlphaSchedule(TypedDict, total=False):
    """When adapters act: at `first` generated tokens from the `start`-th on, each time weaker by the factor `decay`."""

    start: int
    first: int | None
    decay: float


class PromptMessage(TypedDict):
    """A message of a negative prompt for chat."""

    role: str
    content: str


class SteeringOptions(TypedDict, total=False):
    """What a steering has beside its adapters. None takes away what the route has; what is not given is the route's."""

    schedule: AlphaSchedule | None
    plausibility: float | None
    """Leave only tokens whose base probability is at least this fraction of the largest."""
    max_kl: float | None
    """Most nats per token that steering may move the base."""
    negative_prompt: str | Sequence[int] | Sequence[PromptMessage] | None
    """Steer away from how the base goes on after this: text or token ids for completions, messages for chat."""
    guidance_scale: float | None
    """How far."""


class Steering(SteeringOptions, total=False):
    """The `steering` field of a request; the route's own adapters stay where it names none."""

    adapters: list[AdapterChoice] | None
    explain: bool | int
    """Say per token what each model thought of it: True, or the number of alternatives to list."""


class SamplingParams(TypedDict, total=False):
    """What completions and chat completions share; OpenAI's fields first, then the engine's, then Trimtab's.

    What is not given is not sent, so that the gateway's defaults hold.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    n: int | None
    stop: str | list[str] | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: dict[str, float] | None
    user: str | None

    top_k: int | None
    min_p: float | None
    min_tokens: int | None
    repetition_penalty: float | None
    ignore_eos: bool | None
    stop_token_ids: list[int] | None
    skip_special_tokens: bool | None
    include_stop_str_in_output: bool | None
    allowed_token_ids: list[int] | None
    return_token_ids: bool | None

    structured_outputs: dict[str, Any] | None
    bad_words: list[str] | None

    steering: Steering | None
    steering_logprobs: bool | None
    best_of: int | None
    reward: str | Mapping[str, Any] | None
    """A registered reward, weights of several, or `{"combine": "min", "weights": {...}}`."""
    calibration: dict[str, Any] | None
    selection: dict[str, Any] | None

    extra_body: dict[str, Any] | None
    """Further fields of the body, sent as they are; they win over the others."""


class CompletionParams(SamplingParams, total=False):
    """Optional fields of a completion."""

    echo: bool | None
    logprobs: int | None
    suffix: str | None


class ChatParams(SamplingParams, total=False):
    """Optional fields of a chat completion."""

    max_completion_tokens: int | None
    logprobs: bool | None
    top_logprobs: int | None
    response_format: dict[str, Any] | None
    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    chat_template_kwargs: dict[str, Any] | None


Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""Text, several texts, token ids, or several lists of token ids."""

Message = Mapping[str, Any]
"""A chat message: `role`, `content` and what else OpenAI allows."""


class FeedbackParams(TypedDict, total=False):
    """What somebody thinks of a choice: at least one of the first four."""

    rating: float
    """From -1 to 1."""
    thumbs: Literal["up", "down"]
    """In the place of a rating: 1 or -1."""
    comment: str
    preferred_index: int
    """Index of the choice of the same prompt that was liked best."""
    index: int
    """Which choice is meant; 0 when not given."""
    user: str
    """Who thinks so; the same one's next word takes the place of this one."""


class RolloutFilter(TypedDict, total=False):
    """Which rollouts; what is not given does not restrict."""

    route: str
    adapter: str
    version: str
    base_model: str
    steered: bool
    """By an adapter of a weight other than 0."""
    endpoint: Literal["completions", "chat.completions", "reference", "training"]
    request_id: str
    """The answer's `id`."""
    since: float
    until: float
    chosen_only: bool
    has_feedback: bool
    min_rating: float
    max_rating: float
    """Bounds on the mean of the ratings."""
    reward: str
    """A reward that scored them, on which the next four are bounds."""
    min_reward: float
    max_reward: float
    min_calibrated: float
    max_calibrated: float
    whole_requests: bool
    """Conditions on feedback and reward choose requests, and all candidates of a request are read."""
    limit: int


class RolloutPageFilter(RolloutFilter, total=False):
    """Which page of them: `cursor` is the `next_cursor` of the page before."""

    cursor: str


class RewardInput(TypedDict):
    """One text to judge, with the prompt that it answers."""

    prompt: str
    output: str


# What the gateway answers.


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; completion tokens count every candidate, chosen or not."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RewardValue:
    """A reward and where it stands.

    `calibrated` is the probability that the reference policy's own sample for this prompt scores lower, estimated from
    `calibration_size` samples with the standard error `calibration_error`. `calibration_method` says by what; `parts`
    are the rewards of a mix. `calibration_stale` marks a calibrator that was made for something else.
    """

    name: str
    version: str
    raw: float
    calibrated: float | None = None
    calibration_size: int | None = None
    calibration_error: float | None = None
    calibration_method: str | None = None
    calibration_stale: bool = False
    parts: list["RewardValue"] | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Why this candidate was chosen: its place among `num_candidates`, by reward or else by mean log-probability.

    `extra` holds what else the `strategy` has to say, such as `threshold` or `num_stopped`; `left_out` are candidates
    that failed and that the request did without.
    """

    rank: int | None = None
    num_candidates: int | None = None
    mean_logprob: float | None = None
    reward: RewardValue | None = None
    strategy: str | None = None
    warnings: list[str] | None = None
    left_out: list[dict[str, Any]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """One term of the steering of an answer: the exact version and its weight."""

    name: str
    version: str
    alpha: float


@dataclass(frozen=True, slots=True)
class AppliedSchedule:
    """When the adapters acted."""

    start: int = 0
    first: int | None = None
    decay: float = 1.0


@dataclass(frozen=True, slots=True)
class AppliedSteering:
    """What steered an answer."""

    adapters: list[AppliedAdapter] = field(default_factory=list)
    schedule: AppliedSchedule | None = None
    plausibility: float | None = None
    max_kl: float | None = None
    guidance_scale: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have been sampled; a log-probability of None is minus infinity: the token was excluded."""

    token_id: int
    token: str = ""
    base: float | None = None
    steered: float | None = None


@dataclass(frozen=True, slots=True)
class AdapterLogprob:
    """What one adapter thought of a token; None where the schedule kept it from running."""

    name: str
    version: str
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """A sampled token with what each model thought of it, and the most probable tokens before and after steering.

    `kl` is KL(steered || base) of the whole distribution in nats; `flipped` says whether the most probable token
    changed; `negative` is the base's own under the negative prompt.
    """

    token_id: int
    token: str = ""
    base: float | None = None
    adapters: list[AdapterLogprob] = field(default_factory=list)
    negative: float | None = None
    steered: float | None = None
    kl: float = 0.0
    flipped: bool = False
    before: list[Alternative] = field(default_factory=list)
    after: list[Alternative] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of the tokens of a choice, or in a stream of exactly those of its chunk."""

    tokens: list[ExplainedToken] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CompletionLogprobs:
    """OpenAI's log-probabilities of a completion: one entry per token in each list."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One choice, or in a stream the next piece of it."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    selection: Selection | None = None
    explain: Explanation | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CandidateReport:
    """What became of one candidate, chosen or not: `state` is `chosen`, `not_chosen`, `stopped` or `late`."""

    index: int
    state: str
    prompt_index: int = 0
    text: str | None = None
    message: dict[str, Any] | None = None
    finish_reason: str | None = None
    rank: int | None = None
    num_candidates: int | None = None
    mean_logprob: float | None = None
    reward: RewardValue | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """Answer of `POST /v1/completions`, or one chunk of its stream."""

    id: str
    model: str
    choices: list[CompletionChoice]
    created: int = 0
    object: str = "text_completion"
    usage: Usage | None = None
    steering: AppliedSteering | None = None
    candidates: list[CandidateReport] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message of the model, or in a stream the next piece of it."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One choice of a chat completion: `message` when whole, `delta` in a stream."""

    index: int
    message: ChatMessage = field(default_factory=ChatMessage)
    delta: ChatMessage = field(default_factory=ChatMessage)
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None
    selection: Selection | None = None
    explain: Explanation | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """Answer of `POST /v1/chat/completions`, or one chunk of its stream."""

    id: str
    model: str
    choices: list[ChatChoice]
    created: int = 0
    object: str = "chat.completion"
    usage: Usage | None = None
    steering: AppliedSteering | None = None
    candidates: list[CandidateReport] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Feedback:
    """What somebody thinks of a choice, as the gateway keeps it; times are Unix seconds."""

    completion_id: str
    index: int = 0
    rating: float | None = None
    comment: str | None = None
    preferred_index: int | None = None
    user: str | None = None
    created_at: float = 0.0
    updated_at: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Model:
    """A name that a request's `model` may carry: the base model or a route."""

    id: str
    created: int = 0
    owned_by: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
